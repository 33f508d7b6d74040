"""The Swift package beside a model: filled in, and of Swift's grammar. Whether it compiles, only a Mac can tell."""

import re
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_swift

from pippin.export.output import Places
from pippin.export.swift.swift_package import write_swift_package
from pippin.export.tiny_models import save_byte_level
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
    assert len(files) == 9
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


def strings(tree: tree_sitter.Tree) -> set[str]:
    """The texts in quotes of a source."""
    found, todo = set(), [tree.root_node]
    while todo:
        node = todo.pop()
        if node.type == "line_str_text":
            found.add(node.text.decode())
        todo += node.children
    return found


def test_the_options_that_are_told_are_those_that_there_are(written):
    code = (written / "Sources/pippin-generate/Generate.swift").read_text()
    taken = {text for text in strings(parse(code)) if text.startswith("--") and len(text) > 2}
    usage = code.split('"""')[1]
    option = r"(?<![\w-])--[a-z][a-z-]+"
    assert set(re.findall(option, usage)) == taken
    readme = (written / "README.md").read_text()
    of_pippin = {"--record", "--adapter"}  # of commands of its own
    assert set(re.findall(option, readme)) - of_pippin == taken - of_pippin
    units = {
        name for name in ("cpu", "gpu", "ane", "all") if f'"{name}": .' in code and f"`{name}`" in readme
    }
    assert len(units) == 4


def declared(tree: tree_sitter.Tree) -> set[str]:
    """The names of the types, functions and properties that a source declares."""
    found, todo = set(), [tree.root_node]
    while todo:
        node = todo.pop()
        if node.type in ("class_declaration", "function_declaration", "property_declaration", "enum_entry"):
            name = node.child_by_field_name("name")
            found.add(name.text.decode() if name is not None else "")
        todo += node.children
    return found


def test_what_the_readme_uses_is_declared(written):
    names = set().union(*(declared(parse(file.read_text())) for file in written.rglob("*.swift")))
    readme = (written / "README.md").read_text()
    snippets = re.findall(r"```swift\n(.*?)```", readme, re.DOTALL)
    assert len(snippets) == 2 and all(not mistakes(parse(snippet)) for snippet in snippets)
    used = {"Chat", "LanguageModel", "Sampler", "ModelFacts", "answer", "continuation", "reset", "startIds"}
    assert used <= names and all(name in readme for name in used)
    modules = {path.name for path in (written / "Sources").iterdir()}
    assert modules == {"PippinModel", "PippinChat", "pippin-generate"}
    package = (written / "Package.swift").read_text()
    assert all(f'name: "{module}"' in package and module in readme for module in modules)


def test_logits_that_are_no_numbers_are_an_error(written):
    """A sampler takes the first token of such ones, and says nothing."""
    code = (written / "Sources/PippinModel/LanguageModel.swift").read_text()
    guard = code.index("guard next.allSatisfy({ $0.isFinite })")
    assert "throw LanguageModelError.logitsAreNoNumbers" in code[guard : guard + 160]
    assert guard < code.index("self.tokens += tokens")


def functions(tree: tree_sitter.Tree) -> dict[str, str]:
    """The sources of the functions of a source, by their names."""
    found, todo = {}, [tree.root_node]
    while todo:
        node = todo.pop()
        name = node.child_by_field_name("name")
        if node.type == "function_declaration" and name is not None:
            found[name.text.decode()] = node.text.decode()
        todo += node.children
    return found


def test_only_the_model_knows_what_its_caches_hold(written):
    """A conversation with a record of its own would not hear of `reset` and `use`, and would go back to where nothing is."""
    sources = written / "Sources"
    model = functions(parse((sources / "PippinModel/LanguageModel.swift").read_text()))
    assert "tokens = []" in model["reset"] and "reset()" in model["use"]
    assert "tokens.removeLast(position - length)" in model["rewind"]
    chat = (sources / "PippinChat/Chat.swift").read_text()
    reply = functions(parse(chat))["reply"]
    assert "zip(model.tokens, prompt)" in reply and "known" not in chat
    assert reply.index("max(0, min(same, prompt.count - 1))") < reply.index("model.rewind(to: kept)")


def test_an_answer_waits_for_the_one_before_and_changes_the_conversation_when_it_has_ended(written):
    answer = functions(parse((written / "Sources/PippinChat/Chat.swift").read_text()))["answer"]
    order = [
        "await before?.value",
        "var said = self.messages",
        "try await self.reply(",
        "self.messages = said",
        "} catch {",
        "self.running = task",
    ]
    assert sorted(order, key=answer.index) == order
    assert answer.count("messages") == 2  # it is changed in one place


@pytest.mark.parametrize(("template", "told"), [(None, "none: `--chat`"), ("{{ messages }}", "the model's")])
def test_the_readme_says_whether_there_is_a_chat_template(tmp_path, template, told):
    places = Places.of(tmp_path / "small.mlpackage")
    places.folder.mkdir()
    save_byte_level(places.folder / "tokenizer", chat_template=template)
    logits = pb.ExportedTensor(name="logits", shape=[1, 64, 1000])
    functions = [pb.ExportedFunction(name="prefill", outputs=[logits])]
    write_swift_package(places, pb.ExportManifest(functions=functions))
    assert f"| chat template | {told}" in (places.folder / "swift" / "README.md").read_text()
