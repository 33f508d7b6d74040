"""Compressed weights: small integers, and the numbers that they stand for. NumPy only.

An array is cut into equal blocks by a grid: `luts` and `scales` have, for each dim of the array, the number of blocks
along it, which divides the dim. One block has one lookup table, or one scale.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pippin.core.errors import QuantizationError

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
SCALED_BITS = (4, 8)
_CHUNK = 1 << 20  # values that are packed at a time; a multiple of 8
_MAX_FLOAT16 = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True, eq=False)
class Palettized:
    """Weights that are entries of lookup tables.

    Raises:
        QuantizationError: the parts do not fit each other, or a table holds NaN or infinity.
    """

    indices: np.ndarray  # uint8 [*shape], each below 2**bits
    luts: np.ndarray  # float16 [*groups, 2**bits]
    bits: int  # 1, 2, 3, 4, 6 or 8

    def __post_init__(self) -> None:
        _require_bits("Palettized", self.bits, PALETTE_BITS)
        _require_type("Palettized: indices", self.indices, np.uint8)
        _require_type("Palettized: luts", self.luts, np.float16)
        _require_grid("Palettized: luts", self.shape, self.groups)
        if self.luts.shape[-1] != 2**self.bits:
            raise QuantizationError(
                f"Palettized: luts have {self.luts.shape[-1]} entries; at {self.bits} bits they have {2**self.bits}. "
                "Give tables of that length."
            )
        if int(self.indices.max()) >= 2**self.bits:
            raise QuantizationError(
                f"Palettized: an index is {int(self.indices.max())}; at {self.bits} bits the last entry of a table is "
                f"{2**self.bits - 1}. Give indices up to that."
            )
        _require_finite("Palettized: luts", self.luts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.indices.shape

    @property
    def groups(self) -> tuple[int, ...]:
        """How many tables there are along each dim."""
        return self.luts.shape[:-1]

    @property
    def nbytes(self) -> int:
        """Of the packed indices and the tables."""
        return packed_bytes(self.indices.size, self.bits) + self.luts.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Tables counted."""
        return 8 * self.nbytes / self.indices.size

    def dequantized(self) -> np.ndarray:
        """The weights: float32 [*shape], of numbers that float16 has."""
        values = np.empty(self.shape, np.float32)
        luts = self.luts.astype(np.float32)
        sizes = tuple(n // g for n, g in zip(self.shape, self.groups, strict=True))
        for group in np.ndindex(self.groups):
            block = tuple(slice(i * n, (i + 1) * n) for i, n in zip(group, sizes, strict=True))
            values[block] = luts[group][self.indices[block]]
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """Weights that are integers times a scale: int8, or int4 from -8 to 7.

    Raises:
        QuantizationError: the parts do not fit each other, or a product is no number of float16.
    """

    values: np.ndarray  # int8 [*shape]
    scales: np.ndarray  # float16 [*blocks], none below 0
    bits: int  # 4 or 8

    def __post_init__(self) -> None:
        _require_bits("Scaled", self.bits, SCALED_BITS)
        _require_type("Scaled: values", self.values, np.int8)
        _require_type("Scaled: scales", self.scales, np.float16)
        _require_grid("Scaled: scales", self.shape, self.blocks)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if int(self.values.min()) < low or int(self.values.max()) > high:
            raise QuantizationError(
                f"Scaled: values are from {int(self.values.min())} to {int(self.values.max())}; at {self.bits} bits they "
                f"are from {low} to {high}. Clip them."
            )
        _require_finite("Scaled: scales", self.scales)
        if float(self.scales.min()) < 0 or float(self.scales.max()) * -low > _MAX_FLOAT16:
            raise QuantizationError(
                f"Scaled: scales are from {float(self.scales.min())} to {float(self.scales.max())}; they are from 0 to "
                f"{_MAX_FLOAT16 / -low}, so that float16 has every product. Divide the weights by a number."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.values.shape

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many scales there are along each dim."""
        return self.scales.shape

    @property
    def nbytes(self) -> int:
        """Of the packed values and the scales."""
        return packed_bytes(self.values.size, self.bits) + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Scales counted."""
        return 8 * self.nbytes / self.values.size

    def dequantized(self) -> np.ndarray:
        """The weights: float32 [*shape], each product rounded to float16."""
        cut, grid = [], []
        for size, blocks in zip(self.shape, self.blocks, strict=True):
            cut += [blocks, size // blocks]
            grid += [blocks, 1]
        products = self.values.reshape(cut).astype(np.float32) * self.scales.reshape(grid).astype(np.float32)
        return products.astype(np.float16).astype(np.float32).reshape(self.shape)


QuantizedArray = Palettized | Scaled


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes so many integers take."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers of some bits each, end to end from the lowest bit of the first byte: uint8 [bytes], row-major.

    Core ML packs so as well. Bits behind the last integer are 0.

    Args:
        values: uint8 below 2**bits, or int8, of which the lowest bits are kept: two's complement.
        bits: 1 to 8.
    """
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    packed = np.empty(packed_bytes(flat.size, bits), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        spread = np.unpackbits(chunk[:, None], axis=1, count=bits, bitorder="little")
        at = start * bits // 8
        packed[at : at + packed_bytes(chunk.size, bits)] = np.packbits(spread, bitorder="little")
    return packed


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...], signed: bool = False) -> np.ndarray:
    """What `pack` was given: uint8 [*shape], or int8 if `signed`.

    Raises:
        QuantizationError: there are too few bytes or too many, or a bit behind the last integer is set.
    """
    size = math.prod(shape)
    expected = packed_bytes(size, bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise QuantizationError(
            f"packed integers are {packed.dtype}{list(packed.shape)}; {size} of {bits} bits are uint8[{expected}]. "
            "Restore the file from a copy."
        )
    used = size * bits % 8
    if used and int(packed[-1]) >> used:
        raise QuantizationError(
            f"packed integers end in byte {int(packed[-1])}, of which {used} bits are used; the others are 0. "
            "Restore the file from a copy."
        )
    flat = np.empty(size, np.uint8)
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        part = packed[start * bits // 8 :][: packed_bytes(count, bits)]
        spread = np.unpackbits(part, count=count * bits, bitorder="little").reshape(count, bits)
        flat[start : start + count] = np.packbits(spread, axis=1, bitorder="little")[:, 0]
    if signed:
        spare = 8 - bits
        return (flat << spare).view(np.int8).reshape(shape) >> spare
    return flat.reshape(shape)


def _require_bits(what: str, bits: int, known: tuple[int, ...]) -> None:
    if bits not in known:
        raise QuantizationError(f"{what}: bits ({bits}) must be one of {', '.join(map(str, known))}.")


def _require_type(what: str, array: np.ndarray, dtype: type[np.generic]) -> None:
    if array.dtype != dtype or array.size == 0:
        raise QuantizationError(
            f"{what} are {array.dtype}{list(array.shape)}; they must be {np.dtype(dtype)}, at least one."
        )


def _require_grid(what: str, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    if len(grid) != len(shape) or any(size % blocks for size, blocks in zip(shape, grid, strict=True)):
        raise QuantizationError(
            f"{what} are for a grid of {list(grid)} blocks over weights of shape {list(shape)}; each number of blocks "
            "must divide the dim. Give other groups."
        )


def _require_finite(what: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise QuantizationError(f"{what} hold NaN or infinity. Compress weights that are finite in float16.")
