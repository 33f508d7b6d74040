"""Weight files of .mlpackages: MIL blob storage, version 2. Nothing that a file says is believed before it was checked.

    header      64 bytes: u32 count of blobs, u32 version (2), zeros
    metadata    64 bytes, aligned to 64: u32 0xDEADBEEF, u32 type, u64 bytes, u64 offset of the data,
                u64 bits of padding behind the last value, zeros
    data        aligned to 64; values of less than a byte are packed, the first one in the lowest bits

Metadata and data follow each other, blob by blob. A program names a blob by the offset of its metadata.
"""

import dataclasses
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pippin.export.mil import dtypes
from pippin.export.mil.errors import PackageError

ALIGNMENT = 64
_VERSION = 2
_SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II56x")
_METADATA = struct.Struct("<IIQQQ32x")


@dataclasses.dataclass(frozen=True)
class Blob:
    """One array in a file."""

    dtype: dtypes.DType
    offset: int  # of its metadata
    data_offset: int
    num_bytes: int
    count: int  # of values

    @property
    def end(self) -> int:
        return self.data_offset + self.num_bytes


class BlobFile:
    """A weight file, mapped into memory: what is not read takes none."""

    def __init__(self, path: Path):
        """
        Args:
            path: of the file.

        Raises:
            PackageError: it is absent, empty, or of another form.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise PackageError(
                f"the weight file {path} cannot be read: {e}. Copy the whole package again."
            ) from None
        if len(self._data) < ALIGNMENT:
            raise self._damaged(f"has {len(self._data)} bytes, less than its header")
        self._count, version = _HEADER.unpack_from(self._data)
        if version != _VERSION:
            raise self._damaged(f"is of version {version}, not {_VERSION}")
        if any(self._data[_HEADER.size - 56 : _HEADER.size]):
            raise self._damaged("has bytes in its header that are not zero")

    def __len__(self) -> int:
        """The bytes of the file."""
        return len(self._data)

    def blob(self, offset: int) -> Blob:
        """The blob whose metadata lies at an offset.

        Raises:
            PackageError: there is none, or it leaves the file.
        """
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= len(self._data) - ALIGNMENT:
            raise self._damaged(
                f"has no blob at {offset}: it has {len(self._data)} bytes, and a blob starts at a multiple of "
                f"{ALIGNMENT} behind the header"
            )
        sentinel, code, num_bytes, data_offset, padding = _METADATA.unpack_from(self._data, offset)
        where = f"has a blob at {offset}"
        if sentinel != _SENTINEL:
            raise self._damaged(f"has no blob at {offset}: it starts with {sentinel:#x}, not {_SENTINEL:#x}")
        if code not in dtypes.BY_CODE:
            raise self._damaged(f"{where} of an unknown type, {code}; known are {_known()}")
        if any(self._data[offset + _METADATA.size - 32 : offset + _METADATA.size]):
            raise self._damaged(f"{where} whose metadata has bytes that are not zero")
        dtype = dtypes.BY_CODE[code]
        if data_offset != offset + ALIGNMENT:
            raise self._damaged(f"{where} whose data is said to be at {data_offset}, not behind its metadata")
        if num_bytes > len(self._data) - data_offset:
            left = len(self._data) - data_offset
            raise self._damaged(f"{where} of {num_bytes} bytes, of which only {left} are in the file")
        if padding >= 8 or (8 * num_bytes - padding) % dtype.bits or padding > 8 * num_bytes:
            raise self._damaged(
                f"{where} of {num_bytes} bytes and {padding} bits of padding, which is no whole number of {dtype.name}"
            )
        return Blob(dtype, offset, data_offset, num_bytes, (8 * num_bytes - padding) // dtype.bits)

    def read(self, blob: Blob) -> np.ndarray:
        """The values of a blob, flat: a view of the file where they have whole bytes."""
        data = memoryview(self._data)[blob.data_offset : blob.end]
        return dtypes.decode(data, blob.dtype, blob.count)

    def blobs(self) -> Iterator[Blob]:
        """All blobs in order, which fill the file.

        Raises:
            PackageError: they do not.
        """
        at = ALIGNMENT
        for _ in range(self._count):
            blob = self.blob(at)
            yield blob
            at = _aligned(blob.end)
        if len(self._data) > at:
            raise self._damaged(
                f"has {self._count} blobs that end at {at} by its header, and {len(self._data)} bytes"
            )

    def _damaged(self, problem: str) -> PackageError:
        return PackageError(f"the weight file {self.path} {problem}. It is damaged: copy the package again.")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _known() -> str:
    return ", ".join(f"{code} ({dtype.name})" for code, dtype in sorted(dtypes.BY_CODE.items()))
