import os
from pathlib import Path

import pytest

from pippin.core.atomic_file import write_atomic


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_text_is_utf8(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "Ärger")
    assert (tmp_path / "file").read_bytes() == "Ärger".encode()
