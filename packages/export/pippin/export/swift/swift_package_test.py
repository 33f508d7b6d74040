"""The Swift package beside a model: filled in, and of Swift's grammar. Whether it compiles, only a Mac can tell."""

from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_swift

from pippin.export.output import Places
from pippin.export.swift.swift_package import write_swift_package
from pippin.v1 import export_pb2 as pb


@pytest.fixture
def written(tmp_path) -> Path:
    places = Places.of(tmp_path / "small.mlpackage")
    places.folder.mkdir()
    logits = pb.ExportedTensor(name="logits", dtype="float16", shape=[1, 64, 1000])
    exported = pb.ExportManifest(
        model_signature="ab" * 32,
        context_length=512,
        prefill_length=64,
        functions=[pb.ExportedFunction(name="prefill", outputs=[logits])],
        adapter=pb.AdapterLayout(length=4096, rank=16),
    )
    write_swift_package(places, exported)
    return places.folder / "swift"


def parse(text: str) -> tree_sitter.Tree:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language())).parse(text.encode())


def mistakes(tree: tree_sitter.Tree) -> list[str]:
    """Where a text is not of the grammar."""
    found, todo = [], [tree.root_node]
    while todo:
        node = todo.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {node.text!r}")
        todo += node.children
    return found


def test_every_file_is_of_the_grammar(written):
    files = sorted(written.rglob("*.swift"))
    assert len(files) == 7
    assert {f.name: mistakes(parse(f.read_text())) for f in files} == {f.name: [] for f in files}


def test_the_grammar_finds_mistakes():
    assert mistakes(parse("func f( { let = 3"))


def test_the_facts_of_the_model_are_filled_in(written):
    facts = (written / "Sources/PippinModel/ModelFacts.swift").read_text()
    for line in (
        "contextLength = 512",
        "prefillLength = 64",
        "vocabularySize = 1000",
        "adapterLength = 4096",
        "stopIds: Set<Int> = []",
    ):
        assert line in facts
    readme = (written / "README.md").read_text()
    assert "small.mlpackage" in readme and "of rank 16 at most, 4,096 numbers" in readme and "$" not in readme


def test_names_are_those_of_the_program(written):
    """What the code asks Core ML for is what a package of pippin has."""
    code = (written / "Sources/PippinModel/LanguageModel.swift").read_text()
    for name in ("inputIds", "position", "causalMask", "adapter", "logits", "prefill", "decode"):
        assert f'"{name}"' in code


def test_the_readme_says_that_it_was_never_compiled(written):
    assert "never compiled" in (written / "README.md").read_text()
