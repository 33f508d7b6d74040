"""Operations that move values and compute none: shapes, slices, concatenations, tiles, and made-up tensors."""

import numpy as np

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import Tensor, is_set, operation, same_dtype


@operation("reshape", rounds=False)
def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.values.shape[i] if n == 0 and x.values.size else n for i, n in enumerate(shape.ints())]
    return Tensor(x.values.reshape(sizes), x.dtype)


@operation("transpose", rounds=False)
def _transpose(x: Tensor, perm: Tensor) -> Tensor:
    return Tensor(x.values.transpose(perm.ints()), x.dtype)


@operation("expand_dims", rounds=False)
def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    return Tensor(np.expand_dims(x.values, tuple(axes.ints())), x.dtype)


@operation("squeeze", rounds=False)
def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return Tensor(np.squeeze(x.values, None if axes is None else tuple(axes.ints())), x.dtype)


@operation("shape", rounds=False)
def _shape(x: Tensor) -> Tensor:
    return Tensor(np.array(x.values.shape, np.int32), "int32")


@operation("concat", rounds=False)
def _concat(values: list[Tensor], axis: Tensor, interleave: Tensor | None = None) -> Tensor:
    arrays, along = [v.values for v in values], int(axis.item())
    if not is_set(interleave):
        return Tensor(np.concatenate(arrays, along), same_dtype(*values))
    stacked = np.stack(arrays, axis=along % arrays[0].ndim + 1)
    shape = list(arrays[0].shape)
    shape[along] *= len(arrays)
    return Tensor(stacked.reshape(shape), same_dtype(*values))


@operation("stack", rounds=False)
def _stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return Tensor(np.stack([v.values for v in values], int(axis.item())), same_dtype(*values))


@operation("split", rounds=False)
def _split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> list[Tensor]:
    along = int(axis.item())
    if split_sizes is not None:
        sizes = split_sizes.ints()
        if sum(sizes) != x.values.shape[along]:
            raise PackageError(f"its split_sizes add up to {sum(sizes)}, not to {x.values.shape[along]}.")
        parts = np.split(x.values, np.cumsum(sizes)[:-1].tolist(), along)
    elif num_splits is not None:
        parts = np.split(x.values, int(num_splits.item()), along)
    else:
        raise PackageError("it has neither num_splits nor split_sizes.")
    return [Tensor(part, x.dtype) for part in parts]


@operation("tile", rounds=False)
def _tile(x: Tensor, reps: Tensor) -> Tensor:
    return Tensor(np.tile(x.values, reps.ints()), x.dtype)


@operation("reverse", rounds=False)
def _reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return Tensor(np.flip(x.values, None if axes is None else tuple(axes.ints())), x.dtype)


@operation("pad", rounds=False)
def _pad(x: Tensor, pad: Tensor, mode: Tensor | None = None, constant_val: Tensor | None = None) -> Tensor:
    numbers = pad.ints()
    widths = [(0, 0)] * (x.values.ndim - len(numbers) // 2) + list(
        zip(numbers[::2], numbers[1::2], strict=True)
    )
    kind = "constant" if mode is None else mode.item()
    if kind == "constant":
        fill = 0 if constant_val is None else constant_val.item()
        return Tensor(np.pad(x.values, widths, constant_values=fill), x.dtype)
    if kind in ("reflect", "replicate"):
        return Tensor(np.pad(x.values, widths, mode="edge" if kind == "replicate" else "reflect"), x.dtype)
    raise PackageError(f"its mode is {kind!r}; known are constant, reflect, replicate.")


def _slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[int | slice, ...]:
    """The index that parameters of a slice stand for."""
    rank = x.values.ndim
    begins, ends = begin.ints(), end.ints()
    strides = [1] * rank if stride is None else stride.ints()
    free_begin, free_end, squeezed = (
        [False] * rank if mask is None else mask.values.tolist()
        for mask in (begin_mask, end_mask, squeeze_mask)
    )
    index: list[int | slice] = []
    for i in range(rank):
        first = 0 if free_begin[i] else begins[i]
        if squeezed[i]:
            index.append(first)
        else:
            start = None if free_begin[i] else begins[i]
            index.append(slice(start, None if free_end[i] else ends[i], strides[i]))
    return tuple(index)


@operation("slice_by_index", rounds=False)
def _slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    index = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return Tensor(np.asarray(x.values[index]), x.dtype)


@operation("slice_update", rounds=False)
def _slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    index = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x.values.copy()
    if result[index].shape != update.values.shape:
        raise PackageError(f"it writes {update.values.shape} over a slice of {result[index].shape}.")
    result[index] = update.values
    return Tensor(result, same_dtype(x, update))


@operation("slice_by_size", rounds=False)
def _slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    index = []
    for start, count, n in zip(begin.ints(), size.ints(), x.values.shape, strict=True):
        stop = n if count == -1 else start + count
        if not 0 <= start <= stop <= n:
            raise PackageError(f"it takes {start}:{stop} of {n} values.")
        index.append(slice(start, stop))
    return Tensor(x.values[tuple(index)], x.dtype)


@operation("fill", rounds=False)
def _fill(shape: Tensor, value: Tensor | None = None, *, work: np.dtype) -> Tensor:
    if value is None:
        return Tensor(np.zeros(shape.ints(), work), "float32")
    return Tensor(np.full(shape.ints(), value.values), value.dtype)


@operation("fill_like", rounds=False)
def _fill_like(ref_tensor: Tensor, value: Tensor | None = None, *, work: np.dtype) -> Tensor:
    if value is None:
        return Tensor(np.zeros(ref_tensor.values.shape, work), "float32")
    return Tensor(np.full(ref_tensor.values.shape, value.values), value.dtype)


@operation("range_1d")
def _range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    dtype = same_dtype(end, start, step)
    return Tensor(np.arange(start.item(), end.item(), step.item(), dtype=start.values.dtype), dtype)


@operation("band_part", rounds=False)
def _band_part(x: Tensor, lower: Tensor | None = None, upper: Tensor | None = None) -> Tensor:
    rows, columns = x.values.shape[-2:]
    distance = np.arange(rows)[:, None] - np.arange(columns)[None]
    below = -1 if lower is None else int(lower.item())
    above = -1 if upper is None else int(upper.item())
    inside = ((below < 0) | (distance <= below)) & ((above < 0) | (-distance <= above))
    return Tensor(np.where(inside, x.values, np.zeros((), x.values.dtype)), x.dtype)
