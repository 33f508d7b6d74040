"""One server with a real model for the tests of a process: it takes seconds to start."""

import atexit
import contextlib
import functools
import pathlib
import tempfile

from tests.robustness.process import ServerProcess, running
from tests.robustness.tiny_model import parameters, save_adapters, save_model

ADAPTERS = ("poems", "sums")  # that are loaded; there is room for a third
# A context that tests can fill, few rows, and waits that are over soon.
_FLAGS = [
    *("--max-context", "512", "--cache-mib", "2", "--max-requests", "8", "--chunk-tokens", "64"),
    *("--max-waiting", "64", "--slow-reader-timeout", "2"),
]


@functools.cache
def _folder() -> pathlib.Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)


@functools.cache
def model_path() -> pathlib.Path:
    """The tiny model's bundle."""
    return save_model(_folder())


@functools.cache
def adapters_path() -> pathlib.Path:
    """Where its adapters are registered."""
    return save_adapters(_folder() / "adapters", *ADAPTERS)


@functools.cache
def draft_path() -> pathlib.Path:
    """A model that guesses what it will say, often rightly."""
    (_folder() / "draft").mkdir()
    return save_model(_folder() / "draft", parameters(nearly=0.03))


def model_flags() -> list[str]:
    """Flags of a server of the tiny model, with adapters and a model that guesses."""
    loaded = [flag for name in ADAPTERS for flag in ("--load-adapter", name)]
    adapters = ["--adapters", str(adapters_path()), *loaded, "--max-adapters", "3", "--max-adapter-rank", "4"]
    return ["--model", str(model_path()), "--draft-model", str(draft_path()), *adapters, *_FLAGS]


@functools.cache
def shared_server() -> ServerProcess:
    """The server, which ends with this process."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(running(*model_flags()))
