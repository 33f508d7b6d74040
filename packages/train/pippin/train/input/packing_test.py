import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.train.input.packing import SEGMENTS, TARGETS, TOKENS, Packer, to_batch


def _pack(
    documents: list[list[int]], length: int, start: int | None = 0, end: int | None = 1
) -> list[np.ndarray]:
    packer = Packer(length, start, end, pad_id=99)
    rows = [row for document in documents for row in packer.add(document)]
    return [*rows, *packer.flush()]


def test_documents_share_rows_and_long_ones_go_on() -> None:
    rows = _pack([[10, 11, 12, 13, 14, 15], [20], [30, 31, 32, 33]], length=5)
    batch = to_batch(np.stack(rows))
    # The first document fills a row and goes on behind the second, which leaves the best fit for it.
    assert batch["tokens"].tolist() == [[0, 10, 11, 12, 13], [0, 30, 31, 32, 33], [14, 15, 0, 20, 99]]
    assert batch["targets"].tolist() == [[10, 11, 12, 13, 14], [30, 31, 32, 33, 1], [15, 1, 20, 1, 99]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 2, 2, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["loss_weights"].dtype == np.float32
    for name in ("tokens", "targets", "positions", "segment_ids"):
        assert batch[name].dtype == np.int32


def test_a_document_goes_where_the_least_room_is_left() -> None:
    # Rows with 3, 2 and 4 places left; two more tokens and an end fit the first best.
    rows = _pack([[10] * 4, [20] * 5, [30] * 3, [40] * 2], length=8)
    assert [(row[SEGMENTS] > 0).sum() for row in rows] == [8, 6, 4]
    assert rows[0][TARGETS].tolist() == [10, 10, 10, 10, 1, 40, 40, 1]


def test_neither_start_nor_end_is_needed() -> None:
    rows = _pack([[10, 11, 12]], length=4, start=None, end=None)
    assert rows[0][TOKENS].tolist() == [10, 11, 99, 99]
    assert rows[0][TARGETS].tolist() == [11, 12, 99, 99]
    assert _pack([[10]], length=4, start=None, end=None) == []


def test_parts_of_a_document_are_packed_like_the_whole() -> None:
    document = list(range(10, 31))
    whole = _pack([document], length=4)
    packer = Packer(4, 0, 1, 99)
    rows = [*packer.add(document[:3], ends=False), *packer.add([], starts=False, ends=False)]
    rows += [*packer.add(document[3:15], starts=False, ends=False), *packer.add(document[15:], starts=False)]
    np.testing.assert_array_equal(np.stack([*rows, *packer.flush()]), np.stack(whole))


def test_a_document_that_breaks_off_is_kept() -> None:
    packer = Packer(4, 0, 1, 99)
    assert list(packer.add([10, 11], ends=False)) == []
    assert list(packer.add([20], starts=True)) != []
    packer.add([30, 31], ends=False)
    rows = list(packer.flush())
    assert all((row[SEGMENTS] > 0).any() for row in rows)


_DOCUMENTS = st.lists(st.lists(st.integers(2, 1000), max_size=30), max_size=40)


@given(_DOCUMENTS, st.integers(2, 12))
def test_every_token_is_a_target_once(documents: list[list[int]], length: int) -> None:
    batch = to_batch(np.stack([*_pack(documents, length), np.zeros((3, length), np.int64)]))
    counted = batch["loss_weights"] > 0
    targets = batch["targets"][counted]
    expected = [token for document in documents for token in [*document, 1]]
    assert sorted(targets.tolist()) == sorted(expected)
    np.testing.assert_array_equal(counted, batch["segment_ids"] > 0)
    # Inside a document of a row each input is the target before it, and positions count up.
    follows = (batch["positions"][:, 1:] > 0) & counted[:, 1:]
    np.testing.assert_array_equal(batch["tokens"][:, 1:][follows], batch["targets"][:, :-1][follows])
    np.testing.assert_array_equal(batch["positions"][:, 1:][follows], batch["positions"][:, :-1][follows] + 1)
    np.testing.assert_array_equal(batch["segment_ids"][:, 1:][follows], batch["segment_ids"][:, :-1][follows])


@pytest.mark.parametrize("mean", [30, 300, 3000])
def test_hardly_any_room_is_padding(mean: int) -> None:
    random = np.random.RandomState(0)
    rows = _pack([[5] * int(n) for n in random.exponential(mean, 300_000 // mean)], length=512)
    filled = np.mean([(row[SEGMENTS] > 0).mean() for row in rows])
    assert filled > 0.97
