import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pippin.core.errors import DataError
from pippin.train.input import store
from pippin.train.input.rejects import ReadReport
from pippin.train.input.store import StoreReader, StoreWriter, read_index

_LENGTH = 4


def _row(number: int) -> np.ndarray:
    """Tokens that say the row's number, three of them, and one place of padding."""
    return np.array([[number] * 3 + [0], [number + 1] * 3 + [0], [1, 1, 1, 0]], np.int32)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SHARD_TOKENS", 3 * _LENGTH)


def _give_up() -> None:
    raise TimeoutError("nothing more is written")


def _write(directory: Path, rows: int, vocab_size: int = 1000, finish: bool = True) -> StoreWriter:
    writer = StoreWriter(directory, _LENGTH, vocab_size)
    for i in range(rows):
        writer.add(_row(i), ReadReport(documents=i + 1))
    if finish:
        writer.finish(ReadReport(documents=rows))
    return writer


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "int32")])
def test_rows_come_back_as_small_as_the_vocabulary_allows(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    _write(tmp_path, 7, vocab_size)
    reader = StoreReader(tmp_path, _give_up)
    assert reader.completed().rows == 7
    for i in (6, 0, 3):
        np.testing.assert_array_equal(reader.row(i), _row(i))
    assert reader.row(0).dtype == dtype
    assert [reader.shard_rows(shard) for shard in range(4)] == [3, 3, 1, 0]


def test_the_index_counts(tmp_path: Path) -> None:
    _write(tmp_path, 7)
    index = read_index(tmp_path)
    assert index is not None
    assert (index.complete, index.shards, index.rows, index.tokens) == (True, 3, 7, 21)
    assert index.padding(_LENGTH) == 0.25
    assert index.report == ReadReport(documents=7)
    assert read_index(tmp_path / "none") is None


def test_shards_can_be_read_before_the_rest_is_written(tmp_path: Path) -> None:
    writer = _write(tmp_path, 5, finish=False)
    reader = StoreReader(tmp_path, _give_up)
    assert reader.shard_rows(0) == 3
    np.testing.assert_array_equal(reader.row(2), _row(2))
    with pytest.raises(TimeoutError):
        reader.shard_rows(1)
    with pytest.raises(TimeoutError):
        reader.completed()
    assert len(list(reader.shards(9))) == 1
    writer.finish(ReadReport())
    assert reader.shard_rows(1) == 2
    assert len(list(reader.shards(9))) == 2


def test_a_reader_waits_for_what_is_being_written(tmp_path: Path) -> None:
    def write() -> None:
        time.sleep(0.2)
        _write(tmp_path, 4)

    thread = threading.Thread(target=write)
    thread.start()
    reader = StoreReader(tmp_path, lambda: None)
    assert reader.shard_size() == 3
    assert reader.completed().rows == 4
    thread.join()


def test_what_a_dead_process_left_is_written_over(tmp_path: Path) -> None:
    _write(tmp_path, 6, finish=False)
    reader = StoreReader(tmp_path, lambda: None)
    assert reader.shard_rows(1) == 3
    _write(tmp_path, 7)
    assert reader.completed().rows == 7
    np.testing.assert_array_equal(reader.row(6), _row(6))


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_OPEN_SHARDS", 2)
    _write(tmp_path, 12)
    reader = StoreReader(tmp_path, _give_up)
    for i in (0, 11, 3, 8, 1, 9):
        np.testing.assert_array_equal(reader.row(i), _row(i))
    assert len(reader._shards) == 2


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    _write(tmp_path, 0)
    reader = StoreReader(tmp_path, _give_up)
    assert (reader.completed().rows, reader.shard_rows(0), reader.completed().padding(4)) == (0, 0, 0.0)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:100], lambda content: b"", lambda content: b"\x00" * 300]
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: object) -> None:
    _write(tmp_path, 7)
    shard = tmp_path / "00001.npy"
    shard.write_bytes(damage(shard.read_bytes()))  # type: ignore[operator]
    reader = StoreReader(tmp_path, _give_up)
    np.testing.assert_array_equal(reader.row(0), _row(0))
    with pytest.raises(
        DataError, match=rf"{shard}, packed text in the cache, cannot be read: .*Remove {tmp_path};"
    ):
        reader.row(3)


def test_a_shard_of_other_rows_is_named(tmp_path: Path) -> None:
    _write(tmp_path, 7)
    (tmp_path / "00001.npy").write_bytes((tmp_path / "00002.npy").read_bytes())
    with pytest.raises(DataError, match="00001.npy.* has 1 rows where 3 were written"):
        StoreReader(tmp_path, _give_up).row(3)


@pytest.mark.parametrize("content", ["{", "[]", '{"complete": true}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=f"index.json, in the cache, is damaged: .*Remove {tmp_path}"):
        read_index(tmp_path)
