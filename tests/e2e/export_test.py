"""What was trained is what is served and what is exported: one compressed model, by the server and by its package."""

import os
from pathlib import Path

import pytest

from pippin.core.tokenizer import load_tokenizer
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program
from pippin.export.package_runner import PackageRunner
from tests.e2e.as_user import start, write_texts

_PACKAGES = Path(os.environ["RUNFILES_DIR"], "pippin_repo/packages")
_LAUNCH = _PACKAGES / "train/pippin/train/launch"
_SERVER, _CLIENT = (_PACKAGES / "serve/pippin/serve" / name for name in ("server", "client"))
_COMPRESS = _PACKAGES / "export/pippin/export/compress/command"
_COREML, _VERIFY = (_PACKAGES / "export/pippin/export" / name for name in ("coreml", "verify"))
_CONVERT = _PACKAGES / "layers/pippin/layers/convert"
# The default recipe, small, for long enough that it learns its text by heart: what it says next is no toss-up.
_SMALL = [
    *("--steps", "80", "--set", "model.vocab_size=320", "--set", "input.tokenizer.vocab_size=320"),
    *("--set", "model.dim=32", "--set", "model.decoder.layer.feed_forward.hidden_dim=64"),
    *("--set", "input.batch_size=4", "--set", "input.heldout_every=3"),
]
_PROMPT = "Document 1, line 2: the"
_TOKENS = 12


def run(home: Path, program: Path, *arguments: str) -> str:
    """What a command prints."""
    process = start(home, program, *arguments)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (arguments, printed, errors)
    return printed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, and its weights compressed."""
    folder = tmp_path_factory.mktemp("home")
    write_texts(folder)
    run(folder, _LAUNCH, *_SMALL, "--data", "*.txt")
    given = ["--model", "runs/stdlib_tiny", "--recipe", "palettize_4bit", "--out", "compressed"]
    assert "palette 4" in run(folder, _COMPRESS, *given, "--no-evaluation")
    return folder


def served(home: Path, model: str) -> str:
    """What a server of a model writes behind the prompt."""
    server = start(home, _SERVER, "--model", model, "--port", "0", "--max-requests", "2")
    try:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line.startswith("READY "), line + server.stderr.read()
        given = ["--max-tokens", str(_TOKENS), "--temperature", "0", "--complete"]
        return run(home, _CLIENT, "--address", line.split()[1], _PROMPT, *given)
    finally:
        server.kill()
        server.communicate()


def exported(home: Path, package: str) -> str:
    """What the program of a package writes behind the prompt."""
    tokenizer = load_tokenizer(home / "compressed" / "tokenizer")
    runner = PackageRunner(Interpreter(load_program(home / package), Mode.FLOAT16))
    logits = runner.extend([*tokenizer.start_ids, *tokenizer.encode(_PROMPT)])
    ids: list[int] = []
    while len(ids) < _TOKENS:
        ids.append(int(logits[-1].argmax()))
        logits = runner.extend(ids[-1:])
    return tokenizer.decode(ids)


def test_the_server_and_the_package_of_a_compressed_model_say_the_same(home: Path) -> None:
    run(home, _COREML, "--model", "compressed", "--out", "X.mlpackage", "--context", "64", "--prefill", "16")
    assert "all checks passed" in run(home, _VERIFY, "X.mlpackage", "--model", "compressed", "--steps", "8")
    text = served(home, "compressed")
    assert exported(home, "X.mlpackage") in text
    assert "apple" in text  # it has learned something


def test_a_compressed_model_is_converted_as_the_floats_that_it_stands_for(home: Path) -> None:
    run(home, _CONVERT, "compressed", "floats", "--to", "bundle")
    assert served(home, "floats") == served(home, "compressed")
