"""Manifests: textproto files that say what a directory holds and carry their own checksum. No JAX.

A directory is written under another name, its manifest last, and is then
renamed: it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from google.protobuf import text_format
from google.protobuf.message import Message

from pippin.core.errors import CheckpointError
from pippin.v1 import model_pb2 as pb

FILE_NAME = "manifest.textproto"

# Errors of a path, and not of the disk.
_WRONG_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG)

_KIND = "# proto-message: "
_CHECKSUM = "# sha256 of the lines above: "


class DamageError(CheckpointError):
    """Files that are not as they were written. `problems` says which, one each: `file: what`."""

    def __init__(self, directory: Path, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__(
            f"{directory} is damaged: {'; '.join(self.problems)}. Restore the file from a copy, "
            "or use another checkpoint, bundle or export."
        )


def write_manifest(directory: Path, message: Message, name: str = FILE_NAME) -> None:
    """Writes a directory's manifest, durably."""
    text = f"{_KIND}{message.DESCRIPTOR.full_name}\n{text_format.MessageToString(message)}"
    write_file(directory / name, f"{text}{_CHECKSUM}{_sha256(text.encode())}\n".encode())


def read_manifest[M: Message](directory: Path, kind: type[M], name: str = FILE_NAME) -> M:
    """The manifest of a directory.

    Raises:
        DamageError: it is absent, or not as it was written.
        CheckpointError: it is another kind of manifest.
    """
    path = directory / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamageError(directory, [f"{name}: is absent"]) from None
    body, mark, checksum = data.rpartition(_CHECKSUM.encode())
    if not mark or checksum != f"{_sha256(body)}\n".encode():
        raise DamageError(directory, [f"{name}: does not match the checksum in its last line"])
    text = body.decode()
    message = kind()
    header = _KIND + message.DESCRIPTOR.full_name
    if not text.startswith(header + "\n"):
        raise CheckpointError(
            f"{path} starts with {text.partition(chr(10))[0]!r}, not {header!r}: it is of another kind."
        )
    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as e:
        raise CheckpointError(
            f"{path} has fields that this pippin does not know: {e}. Read it with the version of pippin that wrote it."
        ) from None


def describe_file(root: Path, path: Path) -> pb.StoredFile:
    """What a manifest says of a file below `root`."""
    return pb.StoredFile(
        path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path)
    )


def file_problems(root: Path, files: Iterable[pb.StoredFile]) -> list[str]:
    """What is wrong with the files of a manifest, one line a file; each is read whole."""
    problems = []
    for file in files:
        problem = size_problem(root, file.path, file.bytes)
        if not problem and file_sha256(root / file.path) != file.sha256:
            problem = f"{file.path}: does not match its SHA-256"
        if problem:
            problems.append(problem)
    return problems


def size_problem(root: Path, name: str, size: int) -> str:
    """What is wrong with a file, going by its size alone; empty if nothing is."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return f"{name}: leaves the directory"
    try:
        actual = (root / name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name}: is absent"
    return "" if actual == size else f"{name}: has {actual} bytes, not {size}"


def provenance(recipe: str = "", step: int = 0, source: str = "") -> pb.Provenance:
    """The provenance of what is written now, by this version of pippin."""
    try:
        version = importlib.metadata.version("pippin-core")
    except importlib.metadata.PackageNotFoundError:
        version = "source tree"
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return pb.Provenance(pippin_version=version, recipe=recipe, step=step, created=created, source=source)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync(path: Path) -> None:
    """Waits until the disk has a file, or a directory's names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_directory(directory: Path, what: str, *errors: type[Exception]) -> Iterator[Path]:
    """A temporary directory to write into, which becomes `directory` when the block ends, whole or not at all.

    Args:
        directory: there is nothing there yet.
        what: is written, as errors name it: "bundle".
        errors: that mean, beside OSError, that the disk did not take it.

    Raises:
        CheckpointError: the directory is there already, another process writes it, or the disk did not take it.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        require_absent(directory, what)
        with _claimed(temporary, f"the {what} {directory}"):
            require_absent(directory, what)  # whoever wrote it may have just ended
            yield temporary
            publish(temporary, directory)
    except (OSError, *errors) as e:
        raise CheckpointError(f"the {what} {directory} was not saved: {e}. {remedy(e)}") from e


def require_absent(directory: Path, what: str) -> None:
    """Raises CheckpointError where something is there already."""
    if directory.exists():
        raise CheckpointError(
            f"{directory} is there already. Remove it, or save the {what} to another directory."
        )


@contextlib.contextmanager
def _claimed(temporary: Path, what: str) -> Iterator[None]:
    """A block in which an empty temporary directory is this process's alone; what is left of it is then removed."""
    temporary.mkdir(parents=True, exist_ok=True)
    claim = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = temporary.exists() and os.path.samestat(os.fstat(claim), temporary.stat())
        except BlockingIOError:
            is_ours = False
        except OSError:  # a file system without locks
            is_ours = True
        if not is_ours:
            raise CheckpointError(
                f"another process writes {what} at this moment. Wait until it has ended, or choose another name."
            )
        try:
            for left in temporary.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(claim)  # which unlocks it, as the end of the process does


def remedy(error: Exception) -> str:
    """What a person can do about an error of writing."""
    if isinstance(error, OSError) and error.errno in _WRONG_PLACES:
        return "Choose a place that exists and that you may write to."
    return "Make room or mend the disk."


def publish(temporary: Path, final: Path) -> None:
    """Renames a directory that was written whole to where readers look for it, durably."""
    sync(temporary)
    temporary.rename(final)
    sync(final.parent)


def remove(directory: Path) -> None:
    """Removes a directory, if it is there."""
    if directory.exists():
        shutil.rmtree(directory)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
