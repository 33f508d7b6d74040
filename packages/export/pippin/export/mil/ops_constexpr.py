"""Compressed constants: what a device makes of them before, or while, a program runs. No run's inputs are in them."""

import math

import numpy as np

from pippin.export.mil import dtypes
from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import Tensor, operation, same_dtype

PREFIX = "constexpr_"
_SLAB_VALUES = 1 << 22  # that are looked up at a time


@operation("constexpr_lut_to_dense", rounds=False)
def _lut_to_dense(indices: Tensor, lut: Tensor, vector_axis: Tensor | None = None) -> Tensor:
    """Each index replaced by what its group's table says, a number or a vector along `vector_axis`."""
    shape, rank = indices.values.shape, indices.values.ndim
    groups, (entries, size) = lut.values.shape[:-2], lut.values.shape[-2:]
    if lut.values.ndim != rank + 2 or entries != 1 << dtypes.BY_NAME[indices.dtype].bits:
        raise PackageError(
            f"its tables are {lut.values.shape} for indices {indices.dtype}{list(shape)}; they have two more dims, and "
            "an entry for each index."
        )
    blocks = _blocks(shape, groups)
    tables = lut.values.reshape(groups[0], -1, size)
    inner = (np.arange(math.prod(groups[1:])) * entries).reshape([n for g in groups[1:] for n in (g, 1)])
    split = [n for g, b in zip(groups[1:], blocks[1:], strict=True) for n in (g, b)]
    dense = np.empty((*shape, size), lut.values.dtype)
    # So many rows at a time that their places, in 64 bits each, take little memory.
    step = min(blocks[0], max(1, _SLAB_VALUES // max(1, math.prod(shape[1:]))))
    for first in range(0, shape[0], blocks[0]):
        for at in range(first, first + blocks[0], step):
            rows = slice(at, min(at + step, first + blocks[0]))
            found = indices.values[rows].reshape(-1, *split) + inner
            dense[rows] = np.take(tables[first // blocks[0]], found, axis=0).reshape(dense[rows].shape)
    if size == 1:
        return Tensor(dense[..., 0], lut.dtype)
    if vector_axis is None:
        raise PackageError("its tables are of vectors, and it has no vector_axis.")
    along = int(vector_axis.item()) % rank
    result = np.moveaxis(dense, -1, along + 1)
    return Tensor(result.reshape([n * size if i == along else n for i, n in enumerate(shape)]), lut.dtype)


@operation("constexpr_blockwise_shift_scale")
def _blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), each block of values with numbers of its own; rounded once."""
    blocks = _blocks(data.values.shape, scale.values.shape)
    split = [n for g, b in zip(scale.values.shape, blocks, strict=True) for n in (g, b)]
    values = data.values.reshape(split).astype(scale.values.dtype)
    apart = [n for g in scale.values.shape for n in (g, 1)]
    if offset is not None:
        values = values - offset.values.reshape(apart).astype(scale.values.dtype)
    return Tensor((values * scale.values.reshape(apart)).reshape(data.values.shape), scale.dtype)


@operation("constexpr_sparse_to_dense", rounds=False)
def _sparse_to_dense(nonzero_data: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is 1, in order, and zero elsewhere."""
    there = mask.values.astype(bool)
    if there.sum() != nonzero_data.values.size:
        raise PackageError(f"its mask has {there.sum()} ones for {nonzero_data.values.size} values.")
    dense = np.zeros(there.shape, nonzero_data.values.dtype)
    dense[there] = nonzero_data.values.ravel()
    return Tensor(dense, nonzero_data.dtype)


@operation("constexpr_lut_to_sparse", rounds=False)
def _lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: Tensor | None = None
) -> list[Tensor]:
    """A mask, and the values behind its ones by one table for all of them."""
    tables = math.prod(lut.values.shape[:-2])
    if tables != 1 or lut.values.shape[-1] != 1:
        raise PackageError(f"its tables are {lut.values.shape}; one table of numbers is interpreted.")
    values = lut.values.reshape(-1)[indices_nonzero_data.values]
    return [indices_mask, Tensor(values, lut.dtype)]


@operation("constexpr_cast")
def _constexpr_cast(source_val: Tensor, output_dtype: Tensor, work: np.dtype) -> Tensor:
    same_dtype(source_val)
    return Tensor(source_val.values.astype(work), {"fp32": "float32"}.get(output_dtype.item(), "float16"))


def _blocks(shape: tuple[int, ...], groups: tuple[int, ...]) -> list[int]:
    """The values of a group along each dim."""
    if len(shape) != len(groups) or any(g < 1 or n % g for n, g in zip(shape, groups, strict=True)):
        raise PackageError(
            f"{list(groups)} groups do not divide values of the shape {list(shape)}. Each dim must be a multiple."
        )
    return [n // g for n, g in zip(shape, groups, strict=True)]
