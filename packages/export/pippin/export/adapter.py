"""The command `bazel run //packages/export:adapter`, and `pippin-export-adapter`: an adapter for a package that is there."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pippin.core.command_line import run_command
from pippin.core.errors import CheckpointError

if TYPE_CHECKING:
    from pippin.export.adapter_files import Maps
    from pippin.v1 import export_pb2 as pb

SUFFIXES = (".mlpackage", ".aimodel")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    print(add_adapters(args.package, args.adapter, model=args.model, replace=args.replace))
    return 0


def add_adapters(
    package: Path, directories: Sequence[Path], *, model: str | None = None, replace: bool = False
) -> str:
    """Writes adapters beside a package that was exported with room for them; the package stays as it is.

    What was begun and ended early is mended when it is asked for again. An adapter that is there already, as it is, stays.

    Args:
        package: X.mlpackage or X.aimodel, with the folder X beside it.
        directories: of the adapters.
        model: that was exported: a path, or the name of a fetched model. It is looked at only where an adapter leaves out
            parts of a model with stacks, whose lengths the package does not know.
        replace: whether an adapter may take the place of another one of its name.

    Returns:
        What was written, as lines.

    Raises:
        DamageError: the manifest, or a file of an adapter, is absent or not as it was written.
        CheckpointError: there is no package, it has no room for an adapter, one does not fit or was trained on another model,
            or its name is taken.
    """
    # They take JAX.
    from pippin.core import manifest
    from pippin.export.adapter_files import adapter_path, packed_files
    from pippin.export.golden import golden_path
    from pippin.export.output import MANIFEST, Places, exclusive, replace_files
    from pippin.v1 import export_pb2 as pb

    _require_package(package)
    places = Places.of(package)
    with exclusive(places):
        exported = manifest.read_manifest(places.folder, pb.ExportManifest, MANIFEST)
        if not exported.HasField("adapter"):
            raise CheckpointError(
                f"{package} was exported without room for adapters. Export it again with --adapter-rank, which leaves its "
                "weights as they are."
            )
        layout = exported.adapter
        packed = packed_files(directories, layout, lambda maps: _of_layers(maps, layout, package, model))
        files = {adapter_path(places, name): data for name, data in packed.items()}
        new = _new_files(files, exported, places.package.parent, replace)
        if new:
            # Golden vectors of an adapter that is replaced are of the old one.
            replace_files(places, exported, new, [golden_path(places, path.stem) for path in new])
    return "\n".join(
        f"{path}: {len(data) / 1e6:.1f} MB" if path in new else f"{path} is there already"
        for path, data in files.items()
    )


def _new_files(
    files: Mapping[Path, bytes], exported: pb.ExportManifest, root: Path, replace: bool
) -> dict[Path, bytes]:
    """Those of the files that are not on the disk and in the manifest as they are; raises where one may not be replaced."""
    listed = {file.path: file.sha256 for file in exported.files}
    new = {}
    for path, data in files.items():
        there = listed.get(path.relative_to(root).as_posix())
        is_same = there == hashlib.sha256(data).hexdigest()
        if is_same and _holds(path, data):
            continue
        if there and not is_same and not replace:
            raise CheckpointError(
                f"{path} is there already, and is another adapter. Give --replace to put {path.stem} in its place, or rename "
                "the directory of the adapter, from which its name is."
            )
        new[path] = data
    return new


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file is there, with this content."""
    try:
        return path.is_file() and path.read_bytes() == data
    except OSError as e:
        raise CheckpointError(
            f"{path} was not read: {e}. Mend the disk or the rights, or remove the file: it is then written again."
        ) from e


def _require_package(package: Path) -> None:
    if package.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{package} does not end in {' or '.join(SUFFIXES)}. Give a package that //packages/export:coreml or :coreai wrote."
        )
    if not package.exists():
        raise CheckpointError(
            f"there is no package {package}. Export one with //packages/export:coreml, to which --adapter gives adapters too."
        )


def _of_layers(maps: Maps, layout: pb.AdapterLayout, package: Path, model: str | None) -> Maps:
    """Maps as those of the model without stacks."""
    from pippin.export.adapter_files import of_bundle
    from pippin.export.adapter_stacks import maps_by_layer
    from pippin.export.model_source import open_source
    from pippin.layers.named_models import find_model

    room = {slot.name.rpartition(".")[0] for slot in layout.slots}
    if maps.keys() <= room:
        return maps  # the model has no stacks: it was compressed, say
    num_layers = 1 + max(int(path.split(".")[2]) for path in room)
    found = maps_by_layer(maps, num_layers)
    if found is not None:
        return found
    if model is None:
        raise CheckpointError(
            f"the adapter has maps for {', '.join(sorted(maps)[:3])}, which lie in stacks of layers, and for other parts of the "
            f"model it has none: {package} has {num_layers} layers, and does not say which are meant. Give what was exported as "
            "--model."
        )
    source = open_source(find_model(model))
    if source.signature != layout.base_signature:
        raise CheckpointError(
            f"{model} has the signature {source.signature[:12]}; {package} was made of {layout.base_signature[:12]}. Give what "
            "was exported as --model."
        )
    return of_bundle(source.bundle)(maps)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adapter",
        description="Writes adapters beside a package that was exported with --adapter-rank, and leaves the package as it is.",
    )
    parser.add_argument(
        "package", type=Path, metavar="X.mlpackage", help="or X.aimodel, with the folder X beside it"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="an adapter that was trained on what was exported; its file is called X/adapters/NAME.bin as the directory is; "
        "may be given again",
    )
    parser.add_argument(
        "--replace", action="store_true", help="puts adapters in the place of others with the same names"
    )
    parser.add_argument(
        "--model",
        help="what was exported, where an adapter leaves out so much of it that the package does not tell which layers it is "
        "for",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
