"""The manifests of exports for other runtimes than Apple's, whose files lie where these want them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pippin.core.errors import CheckpointError
from pippin.core.manifest import provenance, write_manifest
from pippin.export.output import MANIFEST
from pippin.v1 import export_pb2 as pb
from pippin.v1 import model_pb2


def require_new(path: Path, what: str) -> None:
    """Raises unless there is nothing at a path yet."""
    if path.exists():
        raise CheckpointError(f"{path} is there already. Remove it, or write the {what} somewhere else.")


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
