"""Compressed weights in safetensors files: each is two tensors, and an entry in the manifest; see model.proto. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pippin.core.errors import CheckpointError, QuantizationError
from pippin.core.manifest import DamageError
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled, pack, unpack
from pippin.core.stored_tensor import StoredTensor
from pippin.v1 import model_pb2 as pb

# Scheme -> the ends of the names of its parts: the integers, and what they stand for.
_PARTS = {"palette": (".indices", ".luts"), "scale": (".values", ".scales")}


def stored_parts(name: str, array: QuantizedArray) -> dict[str, np.ndarray]:
    """The tensors that a compressed weight is stored as, by name."""
    match array:
        case Palettized():
            ends, parts = _PARTS["palette"], (pack(array.indices, array.bits), array.luts)
        case Scaled():
            ends, parts = _PARTS["scale"], (pack(array.values, array.bits), array.scales)
    return {name + end: part for end, part in zip(ends, parts, strict=True)}


def describe_quantized(name: str, array: QuantizedArray) -> pb.QuantizedWeight:
    """What a manifest says of a compressed weight."""
    message = pb.QuantizedWeight(name=name, shape=array.shape)
    scheme = message.palette if isinstance(array, Palettized) else message.scale
    scheme.bits = array.bits
    return message


@dataclasses.dataclass(frozen=True)
class StoredQuantized:
    """A compressed weight on disk."""

    directory: Path
    entry: pb.QuantizedWeight
    integers: StoredTensor
    meanings: StoredTensor

    def read(self) -> QuantizedArray:
        """Its parts, read and checked now.

        Raises:
            DamageError: a tensor is not as it was written.
            CheckpointError: they are no compressed weight of this shape.
        """
        shape, scheme = tuple(self.entry.shape), self.entry.WhichOneof("scheme")
        try:
            if scheme == "palette":
                bits = self.entry.palette.bits
                return Palettized(unpack(self.integers.read(), bits, shape), self.meanings.read(), bits)
            bits = self.entry.scale.bits
            return Scaled(unpack(self.integers.read(), bits, shape, signed=True), self.meanings.read(), bits)
        except QuantizationError as error:
            raise CheckpointError(f"{self.directory}: {self.entry.name}: {error}") from None

    def dequantized(self) -> StoredTensor:
        """The weight as a tensor of floats, which is made when it is read."""
        return StoredTensor(tuple(self.entry.shape), np.dtype(np.float32), lambda: self.read().dequantized())


if TYPE_CHECKING:
    _Mapping = Mapping[str, QuantizedArray]
else:
    _Mapping = Mapping  # a run-time check of the type of an item would read it


class QuantizedArrays(_Mapping):
    """The compressed weights of a model by the path of the parameter. Each is read, and checked, when it is looked up."""

    def __init__(self, stored: Mapping[str, StoredQuantized] | None = None):
        self._stored = dict(stored or {})

    def __getitem__(self, name: str) -> QuantizedArray:
        return self._stored[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # without reading

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def stored_quantized(
    directory: Path, message: pb.Quantization, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredQuantized]:
    """The compressed weights of a manifest by name.

    Args:
        directory: that it is of.
        message: what the manifest says of them.
        tensors: all that are stored, by name.

    Raises:
        CheckpointError: one is of a scheme that this pippin does not know.
        DamageError: a part of one is not there, or the weight is there twice.
    """
    found: dict[str, StoredQuantized] = {}
    for entry in message.weights:
        scheme = entry.WhichOneof("scheme")
        if scheme is None:
            raise CheckpointError(
                f"{directory}: {entry.name} is quantised in a way that this pippin does not know; it knows "
                f"{' and '.join(_PARTS)}. Read it with the version of pippin that wrote it."
            )
        if entry.name in tensors or entry.name in found:
            raise DamageError(directory, [f"manifest.textproto: {entry.name} is there twice"])
        parts = [entry.name + end for end in _PARTS[scheme]]
        if absent := [part for part in parts if part not in tensors]:
            raise DamageError(directory, [f"manifest.textproto: {absent[0]} is not in the weights index"])
        found[entry.name] = StoredQuantized(directory, entry, *(tensors[part] for part in parts))
    return found


def part_names(stored: Mapping[str, StoredQuantized]) -> set[str]:
    """The names of the tensors that compressed weights are stored as."""
    return {name + end for name, s in stored.items() for end in _PARTS[str(s.entry.WhichOneof("scheme"))]}
