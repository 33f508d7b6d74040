"""Tensors in safetensors files, each with a SHA-256 in the manifest beside them. No JAX."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np
import safetensors
import safetensors.numpy

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.stored_array import array_sha256
from pippin.v1 import model_pb2 as pb

# What safetensors stores and NumPy reads back.
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")  # fmt: skip
_HALVES = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk. `read` checks its values and returns them; it raises `DamageError`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def stored_tensor(directory: Path, weight: pb.Weight) -> StoredTensor:
    """A tensor of a manifest that lies in a directory."""
    read = functools.partial(_read, directory, weight)
    return StoredTensor(tuple(weight.shape), np.dtype(weight.dtype), read)


def write_tensors(
    folder: Path, stem: str, arrays: Mapping[str, Any], max_file_bytes: int = 4 << 30
) -> list[pb.Weight]:
    """Writes arrays to one safetensors file or several, durably, and tells what a manifest says of them.

    Args:
        folder: which has no such files yet.
        stem: of the files: `stem.safetensors`, or `stem-00001-of-00003.safetensors` and so on.
        arrays: by name, JAX's or NumPy's. Those of one file are in memory at one time.
        max_file_bytes: what is beyond this goes to another file.

    Raises:
        CheckpointError: an array is of a type that cannot be stored.
    """
    groups: list[dict[str, Any]] = [{}]
    size = 0
    for name, array in arrays.items():
        if str(array.dtype) not in _DTYPES:
            raise CheckpointError(
                f"{name} is {array.dtype}; a bundle holds {', '.join(_DTYPES)}. Convert it."
            )
        nbytes = math.prod(array.shape) * array.dtype.itemsize
        if groups[-1] and size + nbytes > max_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = array
        size += nbytes
    weights = []
    for i, group in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{i:05}-of-{len(groups):05}.safetensors"
        # Row-major, since safetensors writes the memory of an array as it lies there.
        values = {name: np.asarray(array, order="C") for name, array in group.items()}
        safetensors.numpy.save_file(values, folder / file)
        manifest.sync(folder / file)
        weights += [
            pb.Weight(name=name, dtype=str(v.dtype), shape=v.shape, file=file, sha256=array_sha256(v))
            for name, v in values.items()
        ]
    return weights


def signature(arrays: Mapping[str, np.ndarray]) -> str:
    """Which weights a model has, whoever wrote them, when, and in which type; see model.proto.

    Args:
        arrays: all weights, by the dotted path of the parameter.
    """

    def line(name: str) -> str:
        values = arrays[name]
        # Exact: each value of these is one of float32.
        values = values.astype(np.float32) if str(values.dtype) in _HALVES else values
        return f"{name} {values.dtype} {'x'.join(map(str, values.shape))} {array_sha256(values)}\n"

    return hashlib.sha256("".join(map(line, sorted(arrays))).encode()).hexdigest()


def _read(directory: Path, weight: pb.Weight) -> np.ndarray:
    def damage(what: object) -> DamageError:
        return DamageError(directory, [f"{weight.file}: {weight.name}: {what}"])

    try:
        # Refuses a header that is longer than the file, and tensors that do not fill the rest of it.
        with safetensors.safe_open(directory / weight.file, framework="np") as file:
            values = file.get_tensor(weight.name)
    except (safetensors.SafetensorError, OSError) as e:
        raise damage(e) from None
    if (str(values.dtype), values.shape) != (weight.dtype, tuple(weight.shape)):
        raise damage(f"is {values.dtype}{list(values.shape)}, not {weight.dtype}{list(weight.shape)}")
    if array_sha256(values) != weight.sha256:
        raise damage("the values do not match their SHA-256")
    return values
