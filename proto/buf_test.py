"""The .proto files are well-formed by buf's rules, and break nothing that was released."""

import os
import pathlib
import subprocess

import pytest

from buf import buf_path

FOLDER = pathlib.Path(__file__).resolve().parent


def run_buf(tmp_path, *arguments: str) -> str:
    """What buf finds, a line each; "" is nothing."""
    environment = dict(os.environ, HOME=str(tmp_path), BUF_CACHE_DIR=str(tmp_path))
    command = [str(buf_path()), *arguments]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in (0, 100), done.stderr
    return done.stdout


def test_the_files_follow_the_rules(tmp_path):
    assert not run_buf(tmp_path, "lint")


def test_nothing_that_was_released_breaks(tmp_path):
    assert not run_buf(tmp_path, "breaking", "--against", "released.binpb")


@pytest.mark.parametrize("change", ["optional int32 max_tokens = 50;", "optional int64 max_tokens = 5;", ""])
def test_a_change_that_breaks_clients_is_found(tmp_path, change):
    for file in [
        "buf.yaml",
        "released.binpb",
        *(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.proto")),
    ]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        content = (FOLDER / file).read_bytes()
        (tmp_path / file).write_bytes(content.replace(b"optional int32 max_tokens = 5;", change.encode()))
    command = ["breaking", str(tmp_path), "--against", "released.binpb"]
    assert "max_tokens" in run_buf(tmp_path, *command)
