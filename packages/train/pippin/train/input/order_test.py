from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.core.errors import DataError
from pippin.train.input import store
from pippin.train.input.order import Place, SampleOrder, TaskOrder
from pippin.train.input.rejects import ReadReport
from pippin.train.input.store import StoreReader, StoreWriter


def _store(directory: Path, rows: int, finish: bool = True) -> StoreReader:
    """A store of shards of 4 rows."""
    writer = StoreWriter(directory, store._SHARD_TOKENS // 4, 10)
    row = np.ones((3, 1), np.int32)
    for _ in range(rows):
        writer.add(row, ReadReport())
    if finish:
        writer.finish(ReadReport())

    def give_up() -> None:
        raise TimeoutError("nothing more is written")

    return StoreReader(directory, give_up)


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return _store(tmp_path_factory.mktemp("ten"), 10)


def _rows(
    reader: StoreReader, count: int, seed: int = 0, name: str = "a", place: Place | None = None
) -> list[int]:
    order = TaskOrder(name, reader, seed, place or Place())
    return [order.next_row() for _ in range(count)]


def test_the_order_is_the_same_for_ever(ten: StoreReader) -> None:
    # Runs that go on with another release must get the same samples.
    first, second = [3, 2, 0, 1, 6, 4, 5, 7, 9, 8], [9, 1, 7, 4, 8, 0, 6, 5, 3, 2]
    assert _rows(ten, 24) == [*first, *second, 9, 4, 5, 1]


def test_each_epoch_has_every_row_once(ten: StoreReader) -> None:
    rows = _rows(ten, 40)
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [sorted(epochs[0][i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_seeds_and_tasks_have_orders_of_their_own(ten: StoreReader) -> None:
    orders = {tuple(_rows(ten, 30, seed, name)) for seed in range(3) for name in ("a", "b")}
    assert len(orders) == 6


@given(taken=st.integers(0, 35))
def test_any_place_goes_on_where_it_was(ten: StoreReader, taken: int) -> None:
    order = TaskOrder("a", ten, 0, Place())
    for _ in range(taken):
        order.next_row()
    place = Place(**vars(order.place))
    assert _rows(ten, 12, place=place) == [order.next_row() for _ in range(12)]


def test_the_first_rows_come_while_the_rest_is_written(tmp_path: Path, ten: StoreReader) -> None:
    reader = _store(tmp_path, 6, finish=False)
    assert _rows(reader, 4) == _rows(ten, 4)
    with pytest.raises(TimeoutError):
        _rows(reader, 5)


def test_a_task_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task 'a' has no text to train on: 0 documents"):
        _rows(_store(tmp_path, 0), 1)


def test_tasks_take_turns_by_their_rates(ten: StoreReader, tmp_path: Path) -> None:
    readers = [ten, _store(tmp_path / "b", 3), _store(tmp_path / "c", 5)]
    tasks = [TaskOrder(name, reader, 0, Place()) for name, reader in zip("abc", readers, strict=True)]
    order = SampleOrder(tasks, [5.0, 3.0, 2.0])
    drawn = "".join("abc"[readers.index(order.next_sample()[0])] for _ in range(100))
    assert drawn[:20] == "abcaabacbaabcaabacba"
    assert Counter(drawn) == {"a": 50, "b": 30, "c": 20}
    # Each task has the same rows in the same order as alone.
    assert tasks[1].place == Place(epoch=9, position=3, drawn=30)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=4), st.integers(1, 200))
def test_no_task_is_ever_far_from_its_rate(ten: StoreReader, rates: list[float], count: int) -> None:
    tasks = [TaskOrder(str(i), ten, 0, Place()) for i in range(len(rates))]
    order = SampleOrder(tasks, rates)
    for _ in range(count):
        order.next_sample()
    for task, rate in zip(tasks, rates, strict=True):
        assert abs(task.place.drawn - count * rate / sum(rates)) <= len(rates)
