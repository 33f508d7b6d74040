"""GGUF files: what their metadata says, and their tensors by name, dequantised when they are read. No JAX.

Counts, lengths, dims and offsets are compared with the size of the file before
anything is allocated or looped over, so that a hostile file costs no more than
its own size.

Source: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.stored_tensor import StoredTensor

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 64 << 20  # many times the largest vocabulary that there is
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 16
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
# The number of a type -> the NumPy dtype of its values.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip

# What `gguf` dequantises, beside float32 and float16.
# fmt: off
_QUANTISED = frozenset((
    "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
))
# fmt: on
_TYPES = _QUANTISED | {"F32", "F16"}

_KINDS = {"integer": "i", "number": "fi", "flag": "b"}  # as NumPy's dtype.kind says them, unsigned as "i"


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A file whose header was read and checked."""

    path: Path
    metadata: Mapping[str, Any]  # key -> str, a NumPy scalar, a list of str, or a NumPy array
    tensors: Mapping[str, StoredTensor]  # name -> float32 tensor, its last dim the fastest

    def text(self, key: str, default: str | None = None) -> str:
        """The string under a key.

        Raises:
            CheckpointError: there is none, and no default; or it is of another kind.
        """
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer under a key; raises as `text` does."""
        return int(self._scalar(key, "integer", default))

    def number(self, key: str, default: float | None = None) -> float:
        """The number under a key, the shortest decimal where it is of 32 bits; raises as `text` does."""
        value = self._scalar(key, "number", default)
        return float(str(value)) if np.asarray(value).dtype == np.float32 else float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """The truth value under a key; raises as `text` does."""
        return bool(self._scalar(key, "flag", default))

    def texts(self, key: str) -> list[str]:
        """The strings under a key, none where it is absent; raises as `text` does."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, "an array of strings")
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        """The numbers under a key, None where it is absent; raises as `text` does."""
        value = self.metadata.get(key)
        if value is not None and not (isinstance(value, np.ndarray) and value.ndim):
            raise self._wrong(key, "an array of numbers")
        return value

    def _scalar(self, key: str, kind: str, default: Any) -> Any:
        value = self._value(key, default)
        if value is not default and not (
            isinstance(value, np.generic) and value.dtype.kind.replace("u", "i") in _KINDS[kind]
        ):
            raise self._wrong(key, f"one {kind}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.path}: its metadata has no {key}. Get the file again, from where models of this kind are made."
            )
        return value

    def _wrong(self, key: str, kind: str) -> CheckpointError:
        value = self.metadata[key]
        got = f"{len(value)} values" if isinstance(value, (list, np.ndarray)) else repr(value)[:80]
        return CheckpointError(f"{self.path}: {key} is {got}; it must be {kind}. Get the file again.")


def open_gguf(path: str | Path) -> GGUFFile:
    """A GGUF file. Its header was read and checked; a tensor is read when it is asked for.

    Raises:
        CheckpointError: it is no GGUF file, of another version, or has tensors of a type that is not known.
        DamageError: what it says of itself does not fit the file.
    """
    path = Path(path).absolute()
    try:
        with open(path, "rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}. Give a {SUFFIX} file.") from None


def _read(path: Path, file: BinaryIO, size: int) -> GGUFFile:
    header = _Header(path, file, size)
    magic = header.take(min(4, size), "the magic")
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path} starts with {magic!r}; a GGUF file starts with {_MAGIC!r}. Give another file."
        )
    version = header.unsigned(4, "the version")
    if version not in _VERSIONS:
        order = "; it is big-endian" if version.to_bytes(4, "big")[0] in _VERSIONS else ""
        raise CheckpointError(
            f"{path} has GGUF version {version}{order}; {_VERSIONS[0]} and {_VERSIONS[1]} in little-endian are read. "
            "Convert the model again, with a llama.cpp of today."
        )
    num_tensors, num_keys = (
        header.unsigned(8, "the number of tensors"),
        header.unsigned(8, "the number of keys"),
    )
    header.require_room(num_keys, 13, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.string("a key")
        if key in metadata:
            raise header.damaged(f"the key {key[:80]!r} is there twice")
        metadata[key] = header.value(header.unsigned(4, "a type"), key[:80])
    header.require_room(num_tensors, 32, "tensors")
    entries = dict(header.tensor() for _ in range(num_tensors))
    if len(entries) != num_tensors:
        raise header.damaged("two tensors have the same name")
    opened = GGUFFile(path, metadata, {})
    alignment = opened.integer("general.alignment", _DEFAULT_ALIGNMENT)
    if not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise header.damaged(
            f"general.alignment is {alignment}, and must be a power of two up to {_MAX_ALIGNMENT}"
        )
    start = -(-header.position // alignment) * alignment
    return dataclasses.replace(opened, tensors=_place(header, entries, start, size))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it."""

    shape: tuple[int, ...]
    type: str
    offset: int  # from where the tensors start
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def _place(header: _Header, entries: dict[str, _Entry], start: int, size: int) -> dict[str, StoredTensor]:
    """The tensors, once each is known to lie in the file, and apart from the others."""
    end, tensors = 0, {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise header.damaged(f"tensor {name[:80]!r} starts inside the one before it")
        end = entry.offset + entry.nbytes
        if start + end > size:
            raise header.damaged(
                f"tensor {name[:80]!r} ends at byte {start + end}, and the file has {size}: it was cut short"
            )
        read = functools.partial(_read_tensor, header.path, name, entry, start + entry.offset)
        tensors[name] = StoredTensor(entry.shape, np.dtype(np.float32), read)
    return tensors


def _read_tensor(path: Path, name: str, entry: _Entry, at: int) -> np.ndarray:
    import gguf

    try:
        raw = np.fromfile(path, np.uint8, entry.nbytes, offset=at)
    except OSError as e:
        raise DamageError(path, [f"tensor {name!r}: {e.strerror}"]) from None
    if raw.size != entry.nbytes:
        raise DamageError(path, [f"tensor {name!r}: {raw.size} of its {entry.nbytes} bytes are there"])
    # Bytes that are no numbers may overflow on the way; they are the file's values all the same.
    with np.errstate(all="ignore"):
        values = gguf.dequantize(raw.reshape(-1, entry.row_bytes), gguf.GGMLQuantizationType[entry.type])
    return np.asarray(values, np.float32).reshape(entry.shape)


class _Header:
    """Reads a file from its start, never beyond its end or `_MAX_HEADER_BYTES`."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path = path
        self._file = file
        self._end = min(size, _MAX_HEADER_BYTES)
        self._cut = "its header may have" if size > _MAX_HEADER_BYTES else "the file has"
        self.position = 0

    def damaged(self, problem: str) -> DamageError:
        return DamageError(self.path, [problem])

    def require_room(self, count: int, each: int, what: str) -> None:
        """Raises `DamageError` unless so many things of so many bytes at least may follow."""
        if count * each > self._end - self.position:
            raise self.damaged(
                f"{count} {what} are announced at byte {self.position}, and {self._cut} {self._end} bytes"
            )

    def take(self, count: int, what: str) -> bytes:
        self.require_room(count, 1, f"bytes of {what}")
        data = self._file.read(count)
        if len(data) != count:
            raise self.damaged(f"it became shorter while it was read, at byte {self.position}")
        self.position += count
        return data

    def unsigned(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def string(self, what: str) -> str:
        data = self.take(self.unsigned(8, f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at byte {self.position - len(data)} is no UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            return self._numbers(kind, 1, key)[0]
        kind, count = self.unsigned(4, f"the type of {key}"), self.unsigned(8, f"the length of {key}")
        if kind != _STRING:
            return self._numbers(kind, count, key)
        self.require_room(count, 8, f"strings of {key}")
        return [self.string(key) for _ in range(count)]

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise self.damaged(
                f"{key} is of type {kind}, and metadata are numbers, strings, or arrays of one of both"
            )
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

    def tensor(self) -> tuple[str, _Entry]:
        import gguf

        name = self.string("a tensor's name")
        num_dims = self.unsigned(4, "a number of dims")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.damaged(f"tensor {name[:80]!r} has {num_dims} dims; 1 to {_MAX_DIMS} are possible")
        dims = cast("tuple[int, ...]", struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, "dims")))
        number, offset = self.unsigned(4, "a tensor's type"), self.unsigned(8, "a tensor's offset")
        kind = next((t.name for t in gguf.GGMLQuantizationType if t == number), None)
        if kind not in _TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name[:80]!r} is of type {kind or number}; {', '.join(sorted(_TYPES))} are read. "
                "Get the model in one of these."
            )
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        if min(dims) < 1 or dims[0] % per_block:
            raise self.damaged(
                f"tensor {name[:80]!r} is {list(dims)}; dims are positive, and the first of {kind} is a multiple of "
                f"{per_block}"
            )
        return name, _Entry(dims[::-1], kind, offset, dims[0] // per_block * block_bytes)
