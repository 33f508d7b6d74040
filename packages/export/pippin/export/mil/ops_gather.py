"""Operations that find values by their places. A place that is not there is an error here; on a device it is undefined."""

from typing import Any

import numpy as np

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import Tensor, operation, same_dtype


def _checked(indices: np.ndarray, size: int) -> np.ndarray:
    """Places among `size` values.

    Raises:
        PackageError: one is not among them.
    """
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        worst = indices.min() if indices.min() < 0 else indices.max()
        raise PackageError(
            f"it takes place {worst} of {size} values. What a device gives there is undefined: clamp the indices."
        )
    return indices


@operation("gather", rounds=False)
def _gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | None = None,
    batch_dims: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    along = (0 if axis is None else int(axis.item())) % x.values.ndim
    batch = 0 if batch_dims is None else int(batch_dims.item())
    places = _checked(indices.values, x.values.shape[along])
    if not batch:
        return Tensor(np.take(x.values, places, axis=along), x.dtype)
    shared = x.values.shape[:batch]
    parts = [np.take(x.values[at], places[at], axis=along - batch) for at in np.ndindex(shared)]
    return Tensor(np.stack(parts).reshape(*shared, *parts[0].shape), x.dtype)


@operation("gather_along_axis", rounds=False)
def _gather_along_axis(
    x: Tensor, indices: Tensor, axis: Tensor | None = None, validate_indices: Tensor | None = None
) -> Tensor:
    along = 0 if axis is None else int(axis.item())
    places = _checked(indices.values, x.values.shape[along])
    return Tensor(np.take_along_axis(x.values, places, along), x.dtype)


@operation("gather_nd", rounds=False)
def _gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Tensor | None = None, validate_indices: Tensor | None = None
) -> Tensor:
    if batch_dims is not None and batch_dims.item():
        raise PackageError("it has batch_dims, which are not interpreted. Gather without.")
    return Tensor(x.values[_places(x, indices)], x.dtype)


@operation("scatter_nd")
def _scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    return _scattered(data, _places(data, indices), updates, mode)


@operation("scatter")
def _scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | None = None,
    mode: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    along = (0 if axis is None else int(axis.item())) % data.values.ndim
    places = _checked(indices.values, data.values.shape[along])
    return _scattered(data, (slice(None),) * along + (places,), updates, mode)


@operation("scatter_along_axis")
def _scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | None = None,
    mode: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    along = (0 if axis is None else int(axis.item())) % data.values.ndim
    places: list[Any] = list(np.ogrid[tuple(slice(n) for n in indices.values.shape)])
    places[along] = _checked(indices.values, data.values.shape[along])
    return _scattered(data, tuple(places), updates, mode)


@operation("one_hot", rounds=False)
def _one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor | None = None,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    size = int(one_hot_vector_size.item())
    hits = indices.values[..., None] == np.arange(size)
    on = Tensor(np.array(1, np.int32), "int32") if on_value is None else on_value
    off = Tensor(np.array(0, np.int32), "int32") if off_value is None else off_value
    values = np.where(hits, on.values, off.values)
    return Tensor(np.moveaxis(values, -1, -1 if axis is None else int(axis.item())), same_dtype(on, off))


def _places(x: Tensor, indices: Tensor) -> tuple[np.ndarray, ...]:
    depth = indices.values.shape[-1]
    return tuple(_checked(indices.values[..., i], x.values.shape[i]) for i in range(depth))


_MODES = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _scattered(data: Tensor, index: Any, updates: Tensor, mode: Tensor | None) -> Tensor:
    result = data.values.copy()
    how = "add" if mode is None else mode.item()
    if how == "update":
        result[index] = updates.values
    elif how in _MODES:
        _MODES[how].at(result, index, updates.values)
    else:
        raise PackageError(f"its mode is {how!r}; known are update, {', '.join(_MODES)}.")
    return Tensor(result, same_dtype(data, updates))
