from pathlib import Path

import pytest

from pippin.core.cache_dir import default_cache_dir


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPPIN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ann")
    assert default_cache_dir() == Path("/home/ann/.cache/pippin")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/ann")
    assert default_cache_dir() == Path("/var/cache/ann/pippin")
    monkeypatch.setenv("PIPPIN_CACHE_DIR", "/fast/disk")
    assert default_cache_dir() == Path("/fast/disk")
