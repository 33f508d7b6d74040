"""What tests of whole commands have in common: text to train on, and programs as a user starts them."""

import os
import subprocess
from pathlib import Path


def write_texts(folder: Path) -> None:
    """Six files that a small model learns soon."""
    for i in range(6):
        lines = [f"Document {i}, line {n}: the apple does not fall far from the tree." for n in range(60)]
        (folder / f"text{i}.txt").write_text("\n".join(lines))


def start(home: Path, program: Path, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A program that is started where a user typed it."""
    env = {**os.environ, "BUILD_WORKING_DIRECTORY": str(home), "PIPPIN_CACHE_DIR": str(home / "cache")}
    command = [str(program), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
