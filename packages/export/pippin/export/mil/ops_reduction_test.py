"""Operations along axes, as coremltools writes them, against NumPy in float64."""

import numpy as np
import pytest

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.testing import Case, check_cases

X = np.random.default_rng(0).uniform(0.1, 2, (2, 3, 4)).astype(np.float16)
WIDE = X.astype(np.float64)


def test_reductions(tmp_path):
    references = {
        "reduce_sum": np.sum,
        "reduce_mean": np.mean,
        "reduce_max": np.max,
        "reduce_min": np.min,
        "reduce_prod": np.prod,
        "reduce_sum_square": lambda x, **k: np.sum(x**2, **k),
        "reduce_l1_norm": lambda x, **k: np.sum(np.abs(x), **k),
        "reduce_l2_norm": lambda x, **k: np.sqrt(np.sum(x**2, **k)),
        "reduce_log_sum": lambda x, **k: np.log(np.sum(x, **k)),
        "reduce_log_sum_exp": lambda x, **k: np.log(np.sum(np.exp(x), **k)),
    }
    cases = []
    for name, reference in references.items():
        for axes, keep in (([-1], True), ([0, 2], False), ([1], False)):
            want = np.asarray(reference(WIDE, axis=tuple(axes), keepdims=keep))
            cases.append(Case(name, {"x": X}, want, {"axes": axes, "keep_dims": keep}))
    check_cases(tmp_path, cases)


def test_places_and_orders(tmp_path):
    x = np.float16([[3, 1, 2, 3], [0, 5, 5, 4]])
    largest, smallest = np.float16([[3, 3], [5, 5]]), np.float16([[1, 2], [0, 4]])
    cases = [
        Case("reduce_argmax", {"x": X}, WIDE.argmax(1), {"axis": 1, "keep_dims": False}),
        Case("reduce_argmin", {"x": X}, WIDE.argmin(-1, keepdims=True), {"axis": -1, "keep_dims": True}),
        Case("argsort", {"x": x}, np.array([[1, 2, 0, 3], [0, 3, 1, 2]]), {"ascending": True}),
        Case("argsort", {"x": x}, np.array([[0, 3, 2, 1], [1, 2, 3, 0]]), {"ascending": False}),
        Case("topk", {"x": x}, [largest, np.array([[0, 3], [1, 2]])], {"k": 2}),
        Case("topk", {"x": x}, [smallest, np.array([[1, 2], [0, 3]])], {"k": 2, "ascending": True}),
    ]
    check_cases(tmp_path, cases)


def test_running_sums(tmp_path):
    backwards = np.flip(np.cumsum(np.flip(WIDE, 1), axis=1), 1)
    cases = [
        Case("cumsum", {"x": X}, np.cumsum(WIDE, axis=2), {"axis": 2}),
        Case("cumsum", {"x": X}, np.cumsum(WIDE, axis=1) - WIDE, {"axis": 1, "exclusive": True}),
        Case("cumsum", {"x": X}, backwards, {"axis": 1, "reverse": True}),
    ]
    check_cases(tmp_path, cases)


def test_places_of_an_odd_type_are_refused():
    with pytest.raises(PackageError, match="gives places as 'float32'"):
        RULES["reduce_argmax"].function(
            Tensor(X, "float16"), output_dtype=Tensor(np.array("float32", object), "string")
        )
