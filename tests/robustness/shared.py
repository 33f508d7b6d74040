"""One server with a real model for the tests of a process: it takes seconds to start."""

import atexit
import contextlib
import functools
import pathlib
import tempfile

from tests.robustness.process import ServerProcess, running
from tests.robustness.tiny_model import save_model

# A context that tests can fill, few rows, and waits that are over soon.
_FLAGS = [
    *("--max-context", "512", "--cache-mib", "2", "--max-requests", "8", "--chunk-tokens", "64"),
    *("--max-waiting", "64", "--slow-reader-timeout", "2"),
]


@functools.cache
def model_path() -> pathlib.Path:
    """The tiny model's bundle."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return save_model(pathlib.Path(folder.name))


def model_flags() -> list[str]:
    """Flags of a server of the tiny model."""
    return ["--model", str(model_path()), *_FLAGS]


@functools.cache
def shared_server() -> ServerProcess:
    """The server, which ends with this process."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(running(*model_flags()))
