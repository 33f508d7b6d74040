"""Operations along axes: sums, means, extremes, their places, and running sums."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pippin.export.mil import dtypes
from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import Tensor, is_set, operation


def _reduction(name: str, compute: Callable[..., np.ndarray], *, rounds: bool = True) -> None:
    def run(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | None = None) -> Tensor:
        over = None if axes is None else tuple(axes.ints())
        result = np.asarray(compute(x.values, axis=over, keepdims=is_set(keep_dims)))
        return Tensor(result.astype(x.values.dtype), x.dtype)

    operation(name, rounds=rounds)(run)


def _log_sum_exp(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    peak = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - peak).sum(axis=axis, keepdims=True)) + peak
    return total if keepdims else np.squeeze(total, axis=axis)


_reduction("reduce_sum", np.sum)
_reduction("reduce_mean", np.mean)
_reduction("reduce_prod", np.prod)
_reduction("reduce_max", np.max, rounds=False)
_reduction("reduce_min", np.min, rounds=False)
_reduction("reduce_sum_square", lambda x, axis, keepdims: np.square(x).sum(axis=axis, keepdims=keepdims))
_reduction("reduce_l1_norm", lambda x, axis, keepdims: np.abs(x).sum(axis=axis, keepdims=keepdims))
_reduction(
    "reduce_l2_norm", lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis=axis, keepdims=keepdims))
)
_reduction("reduce_log_sum", lambda x, axis, keepdims: np.log(x.sum(axis=axis, keepdims=keepdims)))
_reduction("reduce_log_sum_exp", _log_sum_exp)


def _arg(name: str, compute: Callable[..., np.ndarray]) -> None:
    def run(
        x: Tensor,
        axis: Tensor | None = None,
        keep_dims: Tensor | None = None,
        output_dtype: Tensor | None = None,
    ) -> Tensor:
        along = -1 if axis is None else int(axis.item())
        dtype = "int32" if output_dtype is None else output_dtype.item()
        found = np.asarray(compute(x.values, axis=along, keepdims=is_set(keep_dims)))
        return Tensor(found.astype(_integers(dtype)), dtype)

    operation(name, rounds=False)(run)


_arg("reduce_argmax", np.argmax)
_arg("reduce_argmin", np.argmin)


@operation("cumsum")
def _cumsum(
    x: Tensor,
    axis: Tensor | None = None,
    exclusive: Tensor | None = None,
    reverse: Tensor | None = None,
) -> Tensor:
    along = 0 if axis is None else int(axis.item())
    values = np.flip(x.values, along) if is_set(reverse) else x.values
    total = np.cumsum(values, axis=along, dtype=values.dtype)
    if is_set(exclusive):
        total = total - values
    return Tensor(np.flip(total, along) if is_set(reverse) else total, x.dtype)


@operation("argsort", rounds=False)
def _argsort(x: Tensor, axis: Tensor | None = None, ascending: Tensor | None = None) -> Tensor:
    along = -1 if axis is None else int(axis.item())
    return Tensor(_order(x.values, along, is_set(ascending)).astype(np.int32), "int32")


@operation("topk", rounds=False)
def _topk(
    x: Tensor,
    k: Tensor | None = None,
    axis: Tensor | None = None,
    ascending: Tensor | None = None,
    sort: Tensor | None = None,
    return_indices: Tensor | None = None,
    output_indices_dtype: Tensor | None = None,
) -> list[Tensor]:
    if sort is not None and not sort.item():
        raise PackageError("it leaves the order of its results open (sort=False). Sort them.")
    along = -1 if axis is None else int(axis.item())
    count = 1 if k is None else int(k.item())
    best = np.take(_order(x.values, along, is_set(ascending)), range(count), axis=along)
    dtype = "int32" if output_indices_dtype is None else output_indices_dtype.item()
    values = [Tensor(np.take_along_axis(x.values, best, along), x.dtype)]
    if return_indices is None or return_indices.item():
        values.append(Tensor(best.astype(_integers(dtype)), dtype))
    return values


def _order(x: np.ndarray, axis: int, ascending: bool) -> np.ndarray:
    """Places in order of their values; the first of equal ones first."""
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    backwards = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    return np.flip(x.shape[axis] - 1 - backwards, axis)


def _integers(name: str) -> np.dtype:
    if name not in ("int32", "uint16", "int16", "uint8", "int8"):
        raise PackageError(f"it gives places as {name!r}, which is no type of places. Use int32.")
    return dtypes.BY_NAME[name].storage
