"""Adapters on disk: low-rank maps that are added to linear maps of a base model, without the base. No JAX.

manifest.textproto     the signature of the base, and the SHA-256 of each tensor and file
adapter.safetensors    the weights
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.stored_tensor import StoredTensor, stored_tensor, write_tensors
from pippin.v1 import model_pb2 as pb

_DOWN, _UP = ".down", ".up"


class LowRank(NamedTuple):
    """A low-rank map: `x @ down @ up`. Before their own dims, both have those of the stack that their base is in."""

    down: Any  # [..., inputs, rank]
    up: Any  # [..., rank, outputs]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter on disk. Its small files were checked; a tensor is checked when it is read."""

    directory: Path
    base_signature: str  # of the one model that it fits
    tensors: Mapping[str, LowRank]  # dotted path of a linear map of the base -> its StoredTensors
    provenance: pb.Provenance

    @property
    def rank(self) -> int:
        """The largest of its maps."""
        return max(maps.down.shape[-1] for maps in self.tensors.values())

    def maps(self) -> dict[str, LowRank]:
        """Its arrays, read now.

        Raises:
            DamageError: a tensor is not as it was written.
            CheckpointError: a value is not a finite number.
        """
        return {
            path: LowRank(self._read(path + _DOWN, maps.down), self._read(path + _UP, maps.up))
            for path, maps in self.tensors.items()
        }

    def _read(self, name: str, tensor: StoredTensor) -> np.ndarray:
        values = tensor.read().astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.directory}: {name} holds NaN or infinity. Train the adapter again from a step before that."
            )
        return values


def save_adapter(
    directory: str | Path,
    maps: Mapping[str, LowRank],
    base_signature: str,
    provenance: pb.Provenance | None = None,
) -> Path:
    """Writes an adapter, whole or not at all.

    Args:
        directory: where it is to lie; there is nothing there yet. Its name is the adapter's.
        maps: by the dotted path of the linear map of the base; there is at least one.
        base_signature: see `pippin.core.stored_tensor.signature`.
        provenance: where the weights came from.

    Raises:
        CheckpointError: the directory is there already, or there is no room.
    """
    directory = Path(directory).absolute()
    arrays = {path + _DOWN: m.down for path, m in maps.items()} | {
        path + _UP: m.up for path, m in maps.items()
    }
    with manifest.new_directory(directory, "adapter") as temporary:
        message = pb.AdapterManifest(provenance=provenance or manifest.provenance())
        message.adapter.name, message.adapter.base_signature = directory.name, base_signature
        message.adapter.weights.extend(write_tensors(temporary, "adapter", dict(sorted(arrays.items()))))
        files = sorted({weight.file for weight in message.adapter.weights})
        message.files.extend(manifest.describe_file(temporary, temporary / name) for name in files)
        manifest.write_manifest(temporary, message)
    return directory


def load_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory.

    Raises:
        CheckpointError: it is no adapter, or its maps make no sense.
        DamageError: files are absent or not as they were written.
    """
    directory = Path(directory).absolute()
    message = manifest.read_manifest(directory, pb.AdapterManifest)
    if problems := [p for f in message.files if (p := manifest.size_problem(directory, f.path, f.bytes))]:
        raise DamageError(directory, problems)
    files = {file.path for file in message.files}
    for weight in message.adapter.weights:
        if weight.file not in files:
            raise DamageError(
                directory, [f"{weight.name}: lies in {weight.file}, which is none of its files"]
            )
    stored = {w.name: w for w in message.adapter.weights}
    paths = sorted(name.removesuffix(_DOWN) for name in stored if name.endswith(_DOWN))
    if not paths or stored.keys() != {path + end for path in paths for end in (_DOWN, _UP)}:
        raise CheckpointError(f"{directory}: the weights are not pairs of PATH{_DOWN} and PATH{_UP}.")
    for path in paths:
        _require_pair(directory, stored[path + _DOWN], stored[path + _UP])
    tensors = {
        path: LowRank(*(stored_tensor(directory, stored[path + end]) for end in (_DOWN, _UP)))
        for path in paths
    }
    return Adapter(directory, message.adapter.base_signature, tensors, message.provenance)


def _require_pair(directory: Path, down: pb.Weight, up: pb.Weight) -> None:
    """Raises CheckpointError unless two tensors are a low-rank map of floating-point numbers."""
    for weight in (down, up):
        if weight.dtype not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(
                f"{directory}: {weight.name} is {weight.dtype}; an adapter is of float32, float16 or bfloat16."
            )
    fits = (
        len(down.shape) == len(up.shape) >= 2
        and down.shape[:-2] == up.shape[:-2]
        and down.shape[-1] == up.shape[-2] >= 1
    )
    if not fits:
        raise CheckpointError(
            f"{directory}: {down.name} is {list(down.shape)} and {up.name} {list(up.shape)}; they must be "
            "[..., inputs, rank] and [..., rank, outputs]."
        )
