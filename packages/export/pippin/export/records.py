"""What all exports leave beside what they write: a manifest, and nothing of an export that failed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from pippin.core.errors import CheckpointError
from pippin.core.manifest import provenance, write_manifest
from pippin.v1 import export_pb2 as pb
from pippin.v1 import model_pb2

MANIFEST = "export_manifest.textproto"

_SPARE_BYTES = 1 << 20


def require_new(path: Path, what: str) -> None:
    """Raises unless there is nothing at a path yet."""
    if path.exists():
        raise CheckpointError(f"{path} is there already. Remove it, or write the {what} somewhere else.")


def require_room(path: Path, nbytes: int) -> None:
    """Raises unless the disk that a path will be on has room for so many bytes."""
    above = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(above).free
    if free < nbytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{path} takes {nbytes / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB left. Make room, or write it to "
            "another disk."
        )


def export_manifest(
    target: str,
    *,
    signature: str,
    recipe: str,
    source: str,
    weights: Iterable[pb.ExportedWeight],
    context_length: int = 0,
) -> pb.ExportManifest:
    """The manifest of an export, less its files and what is measured later."""
    message = pb.ExportManifest(
        target=target, model_signature=signature, recipe=recipe, context_length=context_length
    )
    message.weights.extend(sorted(weights, key=lambda weight: weight.name))
    message.bits_per_weight = (
        8 * sum(w.bytes for w in message.weights) / sum(w.count for w in message.weights)
    )
    message.provenance.CopyFrom(provenance(source=source))
    return message


def write_export_manifest(
    folder: Path, message: pb.ExportManifest, files: Iterable[model_pb2.StoredFile]
) -> None:
    """Writes a manifest into its folder, last of all files there."""
    del message.files[:]
    message.files.extend(sorted(files, key=lambda file: file.path))
    write_manifest(folder, message, MANIFEST)
