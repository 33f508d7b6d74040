"""Train, serve, ask: the three commands as a user types them, one after the other."""

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.as_user import start, write_texts

_PACKAGES = Path(os.environ["RUNFILES_DIR"], "pippin_repo/packages")
_LAUNCH = _PACKAGES / "train/pippin/train/launch"
_SERVER, _CLIENT = (_PACKAGES / "serve/pippin/serve" / name for name in ("server", "client"))
# The default recipe, so small that it learns nothing.
_SMALL = [
    *("--steps", "2", "--set", "model.vocab_size=320", "--set", "input.tokenizer.vocab_size=320"),
    *("--set", "model.dim=16", "--set", "model.decoder.layer.feed_forward.hidden_dim=32"),
    *("--set", "input.batch_size=4", "--set", "input.heldout_every=3"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a run of the default recipe."""
    folder = tmp_path_factory.mktemp("home")
    write_texts(folder)
    done = start(folder, _LAUNCH, *_SMALL, "--data", "*.txt").communicate()
    assert (folder / "runs" / "stdlib_tiny" / "report.html").exists(), done
    return folder


@pytest.fixture(scope="module")
def server(home):
    """The server of the run, and its address."""
    process = start(home, _SERVER, "--port", "0", "--max-requests", "4", "--withdraw", "0")
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("READY 127.0.0.1:"), line + process.stderr.read()
    _, address, name, _, _ = line.split()
    assert name == "stdlib_tiny"
    yield process, address
    process.kill()
    process.communicate()


def ask(home, address, *arguments):
    process = start(home, _CLIENT, "--address", address, *arguments)
    printed, errors = process.communicate(timeout=120)
    return process.returncode, printed, errors


def test_a_run_that_was_trained_is_found_served_and_asked(home, server):
    _, address = server
    code, printed, errors = ask(home, address, "the apple", "--max-tokens", "8", "--temperature", "0")
    assert (code, errors) == (0, "") and printed.endswith("\n")
    assert ask(home, address, "the apple", "--max-tokens", "8", "--temperature", "0")[1] == printed


def test_what_is_asked_for_wrongly_is_told(home, server):
    _, address = server
    code, printed, errors = ask(home, address, "the apple", "--temperature", "nan")
    assert (code, printed) == (2, "") and "temperature" in errors and "Traceback" not in errors


def test_sigterm_ends_it_well(home, server):
    process, address = server
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert ask(home, address, "the apple", "--timeout", "1")[0] == 69


def test_without_a_model_the_command_that_makes_one_is_told(tmp_path):
    process = start(tmp_path, _SERVER)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "bazel run //packages/train:launch" in errors and "Traceback" not in errors
