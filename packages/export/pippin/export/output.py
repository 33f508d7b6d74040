"""Where an export is written: a package, and beside it a folder with all that goes with it. Both whole, or neither."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.core.tokenizer import copy_tokenizer
from pippin.v1 import export_pb2 as pb
from pippin.v1 import model_pb2

MANIFEST = "export_manifest.textproto"
TOKENIZER = "tokenizer"

_SPARE_BYTES = 16 << 20  # of the small files


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the parts of an export X.mlpackage lie, or are written meanwhile."""

    package: Path  # X.mlpackage
    folder: Path  # X

    @classmethod
    def of(cls, package: str | Path) -> Places:
        """The places of a package that has a suffix."""
        path = Path(package).absolute()
        return cls(path, path.with_suffix(""))

    @property
    def compressed(self) -> Path:
        """The bundle of the weights, where the export compressed them."""
        return self.folder / "compressed"


def require_free(package: str | Path, suffix: str) -> Places:
    """The places of an export that is to be written.

    Raises:
        CheckpointError: the name has another suffix, or something is there already.
    """
    places = Places.of(package)
    if places.package.suffix != suffix:
        raise CheckpointError(
            f"{package} does not end in {suffix}, by which Apple's tools know what it is. Call it "
            f"{Path(package).name}{suffix}."
        )
    for path in (places.package, places.folder):
        if path.exists():
            raise CheckpointError(
                f"{path} is there already. Remove it, or export to another name: a package and the folder beside it, "
                "which has the same name, are written together."
            )
    return places


@contextlib.contextmanager
def new_export(package: str | Path, suffix: str, num_bytes: int) -> Iterator[Places]:
    """Temporary places to write an export to, which become the real ones when the block ends.

    Args:
        package: where it is to lie.
        suffix: that packages of its kind have.
        num_bytes: of the package, about.

    Raises:
        CheckpointError: the name has another suffix, something is there already, or the disk has no room.
    """
    final = require_free(package, suffix)
    require_room(final.package, num_bytes + _SPARE_BYTES)
    published = False
    try:
        with manifest.new_directory(final.folder, "export") as temporary:
            inside = Places(temporary / final.package.name, temporary / final.folder.name)
            inside.folder.mkdir()
            yield inside
            _same_modes(temporary)
            inside.package.rename(final.package)
            published = True
            for path in sorted(inside.folder.iterdir()):
                path.rename(temporary / path.name)
            inside.folder.rmdir()
    except BaseException:
        # The folder is published last: without it, there is no export.
        if published and not final.folder.exists():
            shutil.rmtree(final.package)
        raise


@contextlib.contextmanager
def library_writes(package: Path) -> Iterator[None]:
    """A block in which a library writes a package, and nothing else: its RuntimeErrors mean that the disk did not take it.

    Elsewhere they do not: JAX raises one where memory is short.
    """
    try:
        yield
    except RuntimeError as e:
        raise CheckpointError(f"{package.name} was not saved: {e}. Make room or mend the disk.") from e


def write_tokenizer(source: Path | None, places: Places) -> None:
    """Copies a tokenizer's files, where there are any, into an export's folder."""
    if source is not None:
        copy_tokenizer(source, places.folder / TOKENIZER)


def write_manifest(places: Places, message: pb.ExportManifest) -> None:
    """Writes the manifest of an export, with the SHA-256 of all its files. They have been written."""
    root = places.package.parent
    files = (p for place in (places.package, places.folder) for p in place.rglob("*") if p.is_file())
    message.files.extend(manifest.describe_file(root, path) for path in sorted(files))
    manifest.write_manifest(places.folder, message, MANIFEST)


@contextlib.contextmanager
def rewriting(places: Places, message: pb.ExportManifest, paths: Iterable[Path]) -> Iterator[None]:
    """Files of an export that are written, written again or removed in the block, and its manifest to match.

    Until the block ends, the manifest says nothing of them: whatever happens meanwhile, it is true, and the block can
    run again.

    Args:
        places: of the export.
        message: its manifest, which is written anew.
        paths: of the files.

    Raises:
        CheckpointError: the disk does not take the manifest.
    """
    root, paths = places.package.parent, tuple(paths)
    names = {path.relative_to(root).as_posix() for path in paths}
    others = [file for file in message.files if file.path not in names]
    if len(others) < len(message.files):
        _replace_manifest(places, message, others)
    yield
    new = [manifest.describe_file(root, path) for path in paths if path.is_file()]
    _replace_manifest(places, message, sorted([*others, *new], key=lambda file: file.path))


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file, in place of the one that may be there: whole or not at all.

    Raises:
        CheckpointError: the disk does not take it.
    """
    # A draft that is left behind is written over by whoever tries again.
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        manifest.write_file(draft, data)
        draft.replace(path)
        manifest.sync(path.parent)
    except OSError as e:
        draft.unlink(missing_ok=True)
        raise CheckpointError(f"{path} was not written: {e}. Make room or mend the disk.") from e


def _replace_manifest(
    places: Places, message: pb.ExportManifest, files: Iterable[model_pb2.StoredFile]
) -> None:
    files = list(files)
    del message.files[:]
    message.files.extend(files)
    draft, path = f".{MANIFEST}.tmp", places.folder / MANIFEST
    try:
        manifest.write_manifest(places.folder, message, draft)
        (places.folder / draft).replace(path)
        manifest.sync(places.folder)
    except OSError as e:
        raise CheckpointError(f"{path} was not written: {e}. Make room or mend the disk.") from e


def read_manifest(places: Places) -> pb.ExportManifest:
    """The manifest of an export, whose files are as they were written.

    Raises:
        DamageError: a file is absent, or not as it was written.
        CheckpointError: the manifest is of another kind.
    """
    message = manifest.read_manifest(places.folder, pb.ExportManifest, MANIFEST)
    if problems := manifest.file_problems(places.package.parent, message.files):
        raise manifest.DamageError(places.package, problems)
    return message


def require_room(path: Path, num_bytes: int) -> None:
    """Raises unless the disk that a path will be on has room for so many bytes."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise CheckpointError(
            f"{path} takes about {num_bytes / 1e6:,.0f} MB; the disk has {free / 1e6:,.0f} MB left. Make room, or export "
            "to another disk."
        )


def _same_modes(folder: Path) -> None:
    """Every file and folder with the usual rights, whoever writes it."""
    for path in folder.rglob("*"):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
