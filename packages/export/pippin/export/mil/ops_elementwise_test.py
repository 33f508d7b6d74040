"""Elementwise operations, as coremltools writes them, against NumPy in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.testing import Case, check_cases

_RNG = np.random.default_rng(0)


def halves(*shape: int, low: float = -3, high: float = 3) -> np.ndarray:
    return _RNG.uniform(low, high, shape).astype(np.float16)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


X, Y = halves(2, 3, 4), halves(3, 1)
POSITIVE = halves(2, 3, low=0.1)
SMALL = halves(2, 3, low=-0.9, high=0.9)
INTS, OTHER_INTS = np.array([[5, -7], [0, 3]], np.int32), np.array([[2, 3], [5, -3]], np.int32)
FLAGS, OTHER_FLAGS = np.array([True, False, True]), np.array([True, True, False])


def test_binary_operations_broadcast(tmp_path):
    pairs = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "real_div": np.divide,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "floor_div": np.floor_divide,
        "mod": np.mod,
    }
    cases = [Case(n, {"x": X, "y": Y}, f(wide(X), wide(Y))) for n, f in pairs.items()]
    cases += [
        Case(n, {"x": INTS, "y": OTHER_INTS}, pairs[n](INTS, OTHER_INTS)) for n in ("add", "sub", "mul")
    ]
    cases += [Case("pow", {"x": POSITIVE, "y": SMALL}, wide(POSITIVE) ** wide(SMALL))]
    cases += [Case("add", {"x": X}, wide(X) + 0.5, {"y": np.float16(0.5)})]
    check_cases(tmp_path, cases)


def test_comparisons_and_logic(tmp_path):
    floats = {"x": np.float16([1, 2, 3]), "y": np.float16([3, 2, 1])}
    names = ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal"]
    cases = [Case(n, floats, getattr(np, n)(floats["x"], floats["y"])) for n in names]
    cases += [Case(n, {"x": INTS, "y": OTHER_INTS}, getattr(np, n)(INTS, OTHER_INTS)) for n in names]
    for name in ("logical_and", "logical_or", "logical_xor"):
        cases.append(Case(name, {"x": FLAGS, "y": OTHER_FLAGS}, getattr(np, name)(FLAGS, OTHER_FLAGS)))
    cases.append(Case("logical_not", {"x": FLAGS}, ~FLAGS))
    cases.append(
        Case(
            "select",
            {"cond": FLAGS, "a": floats["x"], "b": floats["y"]},
            np.where(FLAGS, floats["x"], floats["y"]),
        )
    )
    check_cases(tmp_path, cases)


def test_functions_of_one_value(tmp_path):
    anywhere = [
        "abs",
        "sign",
        "ceil",
        "floor",
        "cos",
        "sin",
        "atan",
        "cosh",
        "sinh",
        "tanh",
        "exp",
        "exp2",
        "square",
    ]
    cases = [Case(n, {"x": X}, getattr(np, {"atan": "arctan"}.get(n, n))(wide(X))) for n in anywhere]
    cases += [Case("round", {"x": np.float16([0.5, 1.5, -2.5, 2.4])}, np.array([0.0, 2, -2, 2]))]
    for name, reference in {"acos": np.arccos, "asin": np.arcsin, "atanh": np.arctanh, "tan": np.tan}.items():
        cases.append(Case(name, {"x": SMALL}, reference(wide(SMALL))))
    cases.append(Case("erf", {"x": X}, np.vectorize(math.erf)(wide(X))))
    cases.append(Case("sqrt", {"x": POSITIVE}, np.sqrt(wide(POSITIVE))))
    half = np.float16(0.25)
    cases.append(Case("rsqrt", {"x": POSITIVE}, 1 / np.sqrt(wide(POSITIVE) + 0.25), {"epsilon": half}))
    cases.append(Case("inverse", {"x": POSITIVE}, 1 / (wide(POSITIVE) + 0.25), {"epsilon": half}))
    cases.append(Case("log", {"x": POSITIVE}, np.log(wide(POSITIVE) + 0.25), {"epsilon": half}))
    bounds = {"alpha": np.float16(-1), "beta": np.float16(1.5)}
    cases.append(Case("clip", {"x": X}, np.clip(wide(X), -1, 1.5), bounds))
    cases.append(Case("threshold", {"x": X}, np.maximum(wide(X), -1), {"alpha": np.float16(-1)}))
    check_cases(tmp_path, cases)


def test_casts_go_towards_zero(tmp_path):
    x = np.float16([1.9, -1.9, 0, 3])
    cases = [
        Case("cast", {"x": x}, np.array([1, -1, 0, 3]), {"dtype": "int32"}),
        Case("cast", {"x": x}, np.array([1, 1, 0, 1]), {"dtype": "bool"}),
        Case("cast", {"x": x}, wide(x), {"dtype": "fp32"}),
        Case("cast", {"x": INTS}, INTS, {"dtype": "fp16"}),
    ]
    check_cases(tmp_path, cases)


def tensor(values: object, dtype: str = "float16") -> Tensor:
    return Tensor(np.asarray(values), dtype)


def test_values_of_two_types_are_refused():
    with pytest.raises(PackageError, match="values of one type, and got float16 and int32"):
        RULES["add"].function(tensor([1.0]), tensor([1], "int32"))


def test_integers_are_not_divided_as_floats():
    with pytest.raises(PackageError, match="it divides floats, and got int32"):
        RULES["real_div"].function(tensor([1], "int32"), tensor([1], "int32"))


def test_infinity_is_no_integer():
    with pytest.raises(PackageError, match="infinities or NaN to int32"):
        RULES["cast"].function(tensor([np.inf]), tensor("int32", "string"), work=np.dtype(np.float32))


@given(st.floats(-6e4, 6e4, width=16), st.floats(-6e4, 6e4, width=16))
def test_float32_in_between_rounds_as_float16_does(a, b):
    """For + - * / the result of float32, rounded to float16, is the nearest float16: 24 >= 2 * 11 + 2 bits."""
    x, y = np.float16(a), np.float16(b)
    with np.errstate(all="ignore"):
        for name in ("add", "sub", "mul", "real_div"):
            got = RULES[name].function(tensor(np.float32(x)), tensor(np.float32(y))).values.astype(np.float16)
            exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide}[name]
            np.testing.assert_array_equal(got, exact(np.float64(x), np.float64(y)).astype(np.float16))
