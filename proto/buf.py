"""The buf of @pip, in this folder: bazel run //proto:buf -- lint."""

import os
import pathlib
import shutil
import sys


def buf_path() -> pathlib.Path:
    """The program, which lies beside the interpreter that it was installed for."""
    found = shutil.which("buf", path=str(pathlib.Path(sys.executable).parent))
    assert found is not None, "buf-bin is in requirements.lock"
    return pathlib.Path(found)


if __name__ == "__main__":
    os.chdir(pathlib.Path(os.environ["BUILD_WORKSPACE_DIRECTORY"], "proto"))
    os.execv(buf_path(), ["buf", *sys.argv[1:]])
