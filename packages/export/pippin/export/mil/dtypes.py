"""The types of values in MIL programs and in their weight files."""

import dataclasses

import numpy as np

from pippin.export.mil.errors import PackageError


@dataclasses.dataclass(frozen=True)
class DType:
    """A type of MIL: how many bits a value has in a file, and what NumPy holds it in once it is read."""

    name: str
    bits: int
    storage: np.dtype
    code: int | None = None  # in weight files; None: it does not occur there

    @property
    def is_float(self) -> bool:
        return self.name in _FLOATS

    @property
    def is_sub_byte(self) -> bool:
        return self.bits < 8


_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})

# Source: the numbers in weight files are those of Apple's MIL blob storage, version 2.
_ALL = (
    DType("bool", 8, np.dtype(bool)),
    DType("float16", 16, np.dtype("<f2"), 1),
    DType("float32", 32, np.dtype("<f4"), 2),
    DType("float64", 64, np.dtype("<f8")),
    DType("uint8", 8, np.dtype("u1"), 3),
    DType("int8", 8, np.dtype("i1"), 4),
    DType("bfloat16", 16, np.dtype("<f4"), 5),
    DType("int16", 16, np.dtype("<i2"), 6),
    DType("uint16", 16, np.dtype("<u2"), 7),
    DType("int4", 4, np.dtype("i1"), 8),
    DType("uint1", 1, np.dtype("u1"), 9),
    DType("uint2", 2, np.dtype("u1"), 10),
    DType("uint4", 4, np.dtype("u1"), 11),
    DType("uint3", 3, np.dtype("u1"), 12),
    DType("uint6", 6, np.dtype("u1"), 13),
    DType("int32", 32, np.dtype("<i4"), 14),
    DType("uint32", 32, np.dtype("<u4"), 15),
    DType("int64", 64, np.dtype("<i8")),
    DType("uint64", 64, np.dtype("<u8")),
    DType("string", 0, np.dtype(object)),
)
BY_NAME = {d.name: d for d in _ALL}
BY_CODE = {d.code: d for d in _ALL if d.code is not None}

_GROUP_BYTES = 3  # 24 bits hold a whole number of values of 1, 2, 3, 4, 6 and 8 bits


def is_float(name: str) -> bool:
    """Whether a type of MIL is of floating-point numbers."""
    return name in _FLOATS


def stored_bytes(dtype: DType, count: int) -> int:
    """The bytes of so many values, bits beyond the last one rounded up."""
    return -(-count * dtype.bits // 8)


def decode(data: bytes | memoryview, dtype: DType, count: int) -> np.ndarray:
    """The values that lie in some bytes, as many as promised.

    Values of less than a byte are packed, the first one in the lowest bits.

    Raises:
        PackageError: there are more or fewer bytes.
    """
    if len(data) != stored_bytes(dtype, count):
        raise PackageError(
            f"{count} values of {dtype.name} take {stored_bytes(dtype, count)} bytes, but {len(data)} are there. "
            "The package is damaged: export it again."
        )
    if dtype.is_sub_byte:
        return _unpacked(np.frombuffer(data, np.uint8), dtype, count)
    if dtype.name == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype.storage)


def _unpacked(packed: np.ndarray, dtype: DType, count: int) -> np.ndarray:
    groups = np.zeros((-(-len(packed) // _GROUP_BYTES), _GROUP_BYTES), np.uint8)
    groups.reshape(-1)[: len(packed)] = packed
    words = groups[:, 0] | groups[:, 1].astype(np.uint32) << 8 | groups[:, 2].astype(np.uint32) << 16
    per_group = 8 * _GROUP_BYTES // dtype.bits
    values = np.empty((len(words), per_group), np.uint8)
    for i in range(per_group):
        values[:, i] = words >> (dtype.bits * i) & ((1 << dtype.bits) - 1)
    flat = values.reshape(-1)[:count]
    if dtype.name == "int4":
        return ((flat ^ 8).astype(np.int8) - 8).astype(np.int8)
    return flat
