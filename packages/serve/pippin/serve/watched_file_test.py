import os

import pytest

from pippin.core.errors import ConfigError
from pippin.serve.watched_file import WatchedFiles


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def read_number(paths):
    text = paths[0].read_text()
    if not text.isdigit():
        raise ConfigError(f"{text!r} is no number")
    return int(text)


def write(path, text, age):
    path.write_text(text)
    os.utime(path, ns=(age, age))  # a change is seen also within the clock's resolution


def test_a_change_is_seen_and_what_is_wrong_is_not_taken(tmp_path, caplog):
    path, clock = tmp_path / "number", Clock()
    write(path, "1", 1)
    watched = WatchedFiles([path], read_number, clock)
    write(path, "2", 2)
    assert watched.value == 1, "looked at again after a second"
    clock.now += 1
    assert watched.value == 2
    write(path, "x", 3)
    clock.now += 1
    assert watched.value == 2 and "no number" in caplog.text
    path.unlink()
    clock.now += 1
    assert watched.value == 2
    write(path, "4", 4)
    clock.now += 1
    assert watched.value == 4


def test_the_first_reading_raises(tmp_path):
    path = tmp_path / "number"
    path.write_text("x")
    with pytest.raises(ConfigError, match="no number"):
        WatchedFiles([path], read_number)
