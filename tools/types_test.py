"""The Python files of a folder agree with their type annotations, says pyright."""

import os
import pathlib
import subprocess
import sys


def test_pyright_finds_nothing():
    root = pathlib.Path(os.environ["RUNFILES_DIR"], "pippin_repo")
    # basedpyright is pyright, and brings the Node.js that it runs on.
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--project"]
    command += [str(root / "pyproject.toml"), str(root / os.environ["FOLDER"])]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.replace(f"{root}/", "") + done.stderr
