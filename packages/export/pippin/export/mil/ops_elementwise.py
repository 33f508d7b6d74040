"""Operations on each value by itself: arithmetic, comparisons, logic, functions, casts."""

import math
from collections.abc import Callable

import numpy as np

from pippin.export.mil import dtypes
from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import Tensor, operation, same_dtype

_BOOL = "bool"


def _binary(
    name: str, compute: Callable[[np.ndarray, np.ndarray], np.ndarray], *, rounds: bool = True
) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return Tensor(compute(x.values, y.values), same_dtype(x, y))

    operation(name, rounds=rounds)(run)


def _comparison(name: str, compute: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        same_dtype(x, y)
        return Tensor(compute(x.values, y.values), _BOOL)

    operation(name, rounds=False)(run)


def _unary(name: str, compute: Callable[[np.ndarray], np.ndarray], *, rounds: bool = True) -> None:
    def run(x: Tensor) -> Tensor:
        return Tensor(compute(x.values), x.dtype)

    operation(name, rounds=rounds)(run)


def _float_unary(name: str, compute: Callable[[np.ndarray], np.ndarray]) -> None:
    def run(x: Tensor) -> Tensor:
        if not dtypes.is_float(x.dtype):
            raise PackageError(f"it takes floats, and got {x.dtype}. Cast them before.")
        return Tensor(compute(x.values), x.dtype)

    operation(name)(run)


for _name, _compute in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
}.items():
    _binary(_name, _compute)
for _name, _compute in {"maximum": np.maximum, "minimum": np.minimum}.items():
    _binary(_name, _compute, rounds=False)
for _name, _compute in {
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}.items():
    _comparison(_name, _compute)
for _name, _compute in {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}.items():
    _comparison(_name, _compute)
for _name, _compute in {
    "abs": np.abs,
    "sign": np.sign,
    "ceil": np.ceil,
    "floor": np.floor,
    "round": np.rint,
    "logical_not": np.logical_not,
    "identity": np.asarray,
}.items():
    _unary(_name, _compute, rounds=False)
_unary("square", np.square)
_unary("exp2", np.exp2)


_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, which NumPy does not have, number by number."""
    return np.asarray(_erf(x), x.dtype)


for _name, _compute in {
    "cos": np.cos,
    "sin": np.sin,
    "tan": np.tan,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "cosh": np.cosh,
    "sinh": np.sinh,
    "tanh": np.tanh,
    "atanh": np.arctanh,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "erf": erf,
}.items():
    _float_unary(_name, _compute)


@operation("real_div")
def _real_div(x: Tensor, y: Tensor) -> Tensor:
    dtype = same_dtype(x, y)
    if not dtypes.is_float(dtype):
        raise PackageError(f"it divides floats, and got {dtype}. Use floor_div, or cast them before.")
    return Tensor(x.values / y.values, dtype)


@operation("rsqrt")
def _rsqrt(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    return Tensor(1 / np.sqrt(x.values + _number(epsilon, x, 1e-12)), x.dtype)


@operation("inverse")
def _inverse(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    return Tensor(1 / (x.values + _number(epsilon, x, 1e-4)), x.dtype)


@operation("log")
def _log(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    return Tensor(np.log(x.values + _number(epsilon, x, 1e-45)), x.dtype)


@operation("clip", rounds=False)
def _clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return Tensor(np.clip(x.values, _number(alpha, x, 0), _number(beta, x, 0)), x.dtype)


@operation("threshold", rounds=False)
def _threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return Tensor(np.maximum(x.values, _number(alpha, x, 0)), x.dtype)


_CAST_NAMES = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


@operation("cast")
def _cast(x: Tensor, dtype: Tensor, work: np.dtype) -> Tensor:
    name = _CAST_NAMES.get(dtype.item(), dtype.item())
    if name not in dtypes.BY_NAME or name == "string":
        raise PackageError(f"it casts to {dtype.item()!r}, which is no type of numbers here.")
    if dtypes.is_float(name):
        return Tensor(x.values.astype(work), name)
    values = x.values
    if dtypes.is_float(x.dtype) and name != _BOOL and not np.all(np.isfinite(values)):
        raise PackageError(f"it casts infinities or NaN to {name}, which no device defines.")
    return Tensor(values.astype(dtypes.BY_NAME[name].storage), name)  # towards zero, as Core ML does


@operation("select", rounds=False)
def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if cond.dtype != _BOOL:
        raise PackageError(f"its condition is {cond.dtype}, not bool. Compare, or cast it, before.")
    return Tensor(np.where(cond.values, a.values, b.values), same_dtype(a, b))


def _number(parameter: Tensor | None, like: Tensor, default: float) -> np.generic:
    """A parameter, or its default, as a number of the type of other values: of float16 the default is rounded too."""
    if parameter is not None:
        return like.values.dtype.type(parameter.item())
    number = np.float16(default) if like.dtype == "float16" else np.float32(default)
    return like.values.dtype.type(number)
