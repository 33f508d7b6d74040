"""Operations that find values, as coremltools writes them, against NumPy: bit for bit."""

import numpy as np
import pytest

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.testing import Case, check_cases

X = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
ROWS = np.array([[2, 0], [1, 1]], np.int32)


def test_gathers(tmp_path):
    table = np.arange(20, dtype=np.float16).reshape(5, 4)
    along = np.array([[[1, 2, 0, 0]], [[0, 1, 2, 2]]], np.int32)
    pairs = np.array([[1, 2], [0, 0]], np.int32)
    cases = [
        Case("gather", {"indices": ROWS}, table[ROWS], {"x": table, "axis": 0}),
        Case("gather", {"x": X, "indices": ROWS}, X[:, ROWS], {"axis": 1}),
        Case(
            "gather",
            {"x": X, "indices": ROWS},
            np.stack([X[0, ROWS[0]], X[1, ROWS[1]]]),
            {"axis": 1, "batch_dims": 1},
        ),
        Case("gather_along_axis", {"x": X, "indices": along}, np.take_along_axis(X, along, 1), {"axis": 1}),
        Case("gather_nd", {"x": X, "indices": pairs}, X[[1, 0], [2, 0]]),
    ]
    check_cases(tmp_path, cases)


def test_scatters(tmp_path):
    data = np.zeros((4, 3), np.float16)
    places = np.array([1, 3], np.int32)
    updates = np.float16([[1, 2, 3], [4, 5, 6]])
    replaced, added = data.copy(), data.copy()
    replaced[places] = updates
    np.add.at(added, [1, 1], updates)
    along = np.array([[2, 0, 1]], np.int32)
    put = data.copy()
    np.put_along_axis(put, along, updates[:1], 0)
    cases = [
        Case(
            "scatter",
            {"data": data, "indices": places, "updates": updates},
            replaced,
            {"axis": 0, "mode": "update"},
        ),
        Case(
            "scatter",
            {"data": data, "indices": np.array([1, 1], np.int32), "updates": updates},
            added,
            {"axis": 0, "mode": "add"},
        ),
        Case(
            "scatter_nd",
            {"data": data, "indices": places[:, None], "updates": updates},
            replaced,
            {"mode": "update"},
        ),
        Case(
            "scatter_along_axis",
            {"data": data, "indices": along, "updates": updates[:1]},
            put,
            {"axis": 0, "mode": "update"},
        ),
    ]
    check_cases(tmp_path, cases)


def test_one_hot(tmp_path):
    want = np.where(np.eye(4)[[2, 0]] == 1, 3.0, -1.0)
    numbers = {"on_value": np.float16(3), "off_value": np.float16(-1)}
    indices = {"indices": np.array([2, 0], np.int32)}
    check_cases(tmp_path, [Case("one_hot", indices, want, {"one_hot_vector_size": 4, **numbers})])


@pytest.mark.parametrize("place", [-1, 3])
def test_a_place_that_is_not_there_is_an_error(place):
    indices = Tensor(np.array([place], np.int32), "int32")
    with pytest.raises(PackageError, match=f"takes place {place} of 3 values"):
        RULES["gather"].function(Tensor(X[0], "float16"), indices)
