import os
import subprocess
import sys
from pathlib import Path

import pytest

from pippin.train.input.cache import default_cache_dir, digest, locked


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPPIN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ann")
    assert default_cache_dir() == Path("/home/ann/.cache/pippin")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/ann")
    assert default_cache_dir() == Path("/var/cache/ann/pippin")
    monkeypatch.setenv("PIPPIN_CACHE_DIR", "/fast/disk")
    assert default_cache_dir() == Path("/fast/disk")


def test_equal_values_have_equal_digests() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_lock_is_free_when_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from pippin.train.input.cache import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
        with locked(path):
            pass
