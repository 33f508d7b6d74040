"""Where an export is written: a package, and beside it a folder with all that goes with it. Both whole, or neither."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.core.tokenizer import copy_tokenizer
from pippin.v1 import export_pb2 as pb
from pippin.v1 import model_pb2

MANIFEST = "export_manifest.textproto"
TOKENIZER = "tokenizer"
REPORT = "report.html"

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
        CheckpointError: the name has another suffix, something is there already, or nothing can be written there.
    """
    places = Places.of(package)
    if places.package.suffix != suffix:
        raise CheckpointError(
            f"{package} does not end in {suffix}, by which Apple's tools know what it is. Call it "
            f"{Path(package).name}{suffix}."
        )
    try:
        for path in (places.package, places.folder):
            if path.exists():
                raise CheckpointError(
                    f"{path} is there already. Remove it, or export to another name: a package and the folder beside it, "
                    "which has the same name, are written together."
                )
        there = next(parent for parent in places.package.parents if parent.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as e:
        raise CheckpointError(f"{package} cannot be written: {e}. {manifest.remedy(e)}") from e
    if not writable:
        what = "is no folder that you may write to" if there.is_dir() else "is no folder"
        raise CheckpointError(f"{package} cannot be written: {there} {what}. Choose another place.")
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
            parts = inside.folder.rename(temporary / ".parts")  # one of them may be called as the folder is
            for path in sorted(parts.iterdir()):
                path.rename(temporary / path.name)
            parts.rmdir()
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
        raise CheckpointError(f"{package.name} was not saved: {e}. {manifest.remedy(e)}") from e


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
def exclusive(places: Places) -> Iterator[None]:
    """A block in which this process alone changes an export: others that would do so wait until it ends.

    On a file system without locks, they do not wait.

    Raises:
        CheckpointError: there is no folder beside the package.
    """
    try:
        folder = os.open(places.folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise CheckpointError(
            f"{places.folder} was not opened: {e}. Put it beside {places.package.name}, with which it was written."
        ) from e
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # which unlocks it, as the end of the process does


@contextlib.contextmanager
def rewriting(places: Places, paths: Iterable[Path]) -> Iterator[pb.ExportManifest]:
    """Files of an export that are written, written again or removed in the block, and its manifest to match.

    Until the block ends, the manifest says nothing of them: whatever happens meanwhile, it is true, and the block can
    run again. It is exclusive.

    Args:
        places: of the export.
        paths: of the files.

    Yields:
        The manifest as it is on the disk, which is written anew with what the block changes of it.

    Raises:
        CheckpointError: the disk does not take the manifest, or does not give the files.
    """
    with exclusive(places):
        message = manifest.read_manifest(places.folder, pb.ExportManifest, MANIFEST)
        with _unlisted(places, message, paths):
            yield message


def replace_files(
    places: Places, message: pb.ExportManifest, files: Mapping[Path, bytes], outdated: Iterable[Path]
) -> None:
    """Writes files of an export and lists them, once the disk has room for all: before that, nothing is changed.

    Args:
        places: of the export, in a block in which it is `exclusive`.
        message: its manifest, as it is on the disk; it is written anew.
        files: their contents by their paths.
        outdated: files that are then no longer true, and are removed.

    Raises:
        CheckpointError: the disk does not take a file or the manifest.
    """
    outdated = tuple(outdated)
    drafts = {path: _draft(path) for path in files}
    try:
        for path, data in files.items():
            with _disk_takes(path):
                path.parent.mkdir(exist_ok=True)
                manifest.write_file(drafts[path], data)
        with _unlisted(places, message, [*files, *outdated]):
            for path, draft in drafts.items():
                with _disk_takes(path):
                    draft.replace(path)
                    manifest.sync(path.parent)
            for path in outdated:
                with _disk_takes(path, "removed"):
                    path.unlink(missing_ok=True)
    except CheckpointError:
        for draft in drafts.values():
            _discard(draft)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file, in place of the one that may be there: whole or not at all.

    Raises:
        CheckpointError: the disk does not take it.
    """
    draft = _draft(path)
    with _disk_takes(path, draft=draft):
        path.parent.mkdir(exist_ok=True)
        manifest.write_file(draft, data)
        draft.replace(path)
        manifest.sync(path.parent)


def _draft(path: Path) -> Path:
    """Where a file is written before it takes its name. One that is left behind is written over by whoever tries again."""
    return path.with_name(f".{path.name}.tmp")


def _discard(draft: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to tell
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_takes(path: Path, done: str = "written", draft: Path | None = None) -> Iterator[None]:
    """A block whose OSErrors say that a file was not written, and leave no draft of it."""
    try:
        yield
    except OSError as e:
        if draft is not None:
            _discard(draft)
        raise CheckpointError(f"{path} was not {done}: {e}. {manifest.remedy(e)}") from e


@contextlib.contextmanager
def _unlisted(places: Places, message: pb.ExportManifest, paths: Iterable[Path]) -> Iterator[None]:
    """A block in which the manifest on the disk says nothing of files; behind it, it says what they are."""
    root, paths = places.package.parent, tuple(paths)
    names = {path.relative_to(root).as_posix() for path in paths}
    others = [file for file in message.files if file.path not in names]
    if len(others) < len(message.files):
        _replace_manifest(places, message, others)
    yield
    new = []
    for path in paths:
        with _disk_takes(path, "read again"):
            if path.is_file():
                new.append(manifest.describe_file(root, path))
    _replace_manifest(places, message, sorted([*others, *new], key=lambda file: file.path))


def _replace_manifest(
    places: Places, message: pb.ExportManifest, files: Iterable[model_pb2.StoredFile]
) -> None:
    files = list(files)
    del message.files[:]
    message.files.extend(files)
    path = places.folder / MANIFEST
    draft = _draft(path)
    with _disk_takes(path, draft=draft):
        manifest.write_manifest(places.folder, message, draft.name)
        draft.replace(path)
        manifest.sync(places.folder)


def read_manifest(places: Places) -> pb.ExportManifest:
    """The manifest of an export, whose files are as they were written.

    Raises:
        DamageError: a file is absent, or not as it was written.
        CheckpointError: the manifest is of another kind.
    """
    message = manifest.read_manifest(places.folder, pb.ExportManifest, MANIFEST)
    written_as = {file.path.partition("/")[0] for file in message.files}
    if message.files and not written_as & {places.package.name, places.folder.name}:
        names = " and ".join(sorted(written_as))
        raise CheckpointError(
            f"{places.package.name} and the folder beside it were written as {names}, by which their manifest names their files. "
            "Give both these names again, or export the model under the new one."
        )
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
