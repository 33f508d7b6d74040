"""The directory of a run's checkpoints: one folder a step, by one job at a time. No JAX.

checkpoints/
    .lease           locked while a job writes here
    1000/            a step: whole, since it is renamed to this when all is written
    2000.tmp/        a step that is being written, or was when its job was killed
    500.removing/    a step that is being removed
    1500.damaged/    a step that was found damaged, and set aside
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.v1 import model_pb2 as pb

COMPONENT_FILE = "component.textproto"
EXTRA_FOLDER = "extra"
LEASE = ".lease"
_ATTEMPTS = 20
_TEMPORARY, _REMOVING, _DAMAGED = ".tmp", ".removing", ".damaged"

_log = logging.getLogger(__name__)


def read_step(folder: Path) -> pb.CheckpointManifest:
    """The manifest of a step. All of its files were found, and found whole but for the values of its arrays.

    Raises:
        DamageError: files are absent or not as they were written.
    """
    message = manifest.read_manifest(folder, pb.CheckpointManifest)
    problems = manifest.file_problems(folder, message.files)
    chunks = (chunk for array in message.arrays for chunk in array.chunks)
    problems += filter(None, (manifest.size_problem(folder, c.file, c.bytes) for c in chunks))
    if problems:
        raise manifest.DamageError(folder, problems)
    return message


class CheckpointSteps:
    """The steps in a directory of checkpoints."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._lease: IO[str] | None = None

    def steps(self) -> list[int]:
        """The steps that are there and were not set aside, newest first."""
        return sorted((int(p.name) for p in self._folders() if p.name.isdecimal()), reverse=True)

    def damaged(self) -> list[Path]:
        """The folders that were set aside."""
        return sorted(p for p in self._folders() if _DAMAGED in p.name)

    def folder(self, step: int) -> Path:
        """Where a step lies."""
        return self.directory / str(step)

    def acquire(self) -> None:
        """Takes the directory for this job, and clears away what a killed one left.

        Raises:
            CheckpointError: another job has it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / LEASE
        lease = path.open("a+")
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lease.seek(0)
            holder = lease.read().strip() or "another job"
            lease.close()
            raise CheckpointError(
                f"{self.directory} is in use by {holder}: one job at a time saves to a directory. "
                "Stop that job, or give this one another directory."
            ) from None
        lease.truncate(0)
        lease.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lease.flush()
        self._lease = lease
        for path in self._folders():
            if path.suffix in (_TEMPORARY, _REMOVING):
                manifest.remove(path)

    def release(self) -> None:
        """Lets another job have the directory."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def begin(self, step: int) -> Path:
        """A new folder to write a step to; `commit` makes it the step.

        Raises:
            CheckpointError: the step is there already.
        """
        if self.folder(step).exists():
            raise CheckpointError(
                f"{self.folder(step)} is there already, from an earlier run: a checkpoint is never overwritten. "
                "Remove it and the later steps, or save to another directory."
            )
        temporary = self.temporary(step)
        manifest.remove(temporary)
        temporary.mkdir()
        return temporary

    def temporary(self, step: int) -> Path:
        """Where a step is written before it is committed."""
        return self.directory / f"{step}{_TEMPORARY}"

    def discard(self, step: int) -> None:
        """Removes what was written to the folder of `begin`, though writers may still be adding to it."""
        for _ in range(_ATTEMPTS):
            shutil.rmtree(self.temporary(step), ignore_errors=True)
            time.sleep(0.1)
            if not self.temporary(step).exists():
                return
        _log.warning("%s could not be removed; the next job to save here removes it", self.temporary(step))

    def require_room(self, num_bytes: int) -> None:
        """Raises `OSError` unless so many bytes can be written now."""
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes are needed, {free:,} are free",
            )

    def commit(self, step: int) -> None:
        """Makes what was written to the folder of `begin` the step."""
        manifest.publish(self.temporary(step), self.folder(step))

    def keep(self, last: int, every: int | None) -> None:
        """Removes all steps but the newest `last` and the multiples of `every`."""
        for step in self.steps()[last:]:
            if every and step % every == 0:
                continue
            removing = self.directory / f"{step}{_REMOVING}"
            try:
                self.folder(step).rename(removing)
                manifest.remove(removing)
            except OSError as e:
                _log.warning("the old checkpoint %s could not be removed: %s", self.folder(step), e)

    def aside(self, step: int) -> Path:
        """Where a damaged step is to be set aside."""
        taken = len([p for p in self.damaged() if p.name.startswith(f"{step}{_DAMAGED}")])
        return self.directory / f"{step}{_DAMAGED}{f'.{taken}' if taken else ''}"

    def set_aside(self, step: int, aside: Path) -> None:
        """Renames a damaged step, so that nothing takes it for a checkpoint; it stays where it may not be renamed."""
        try:
            self.folder(step).rename(aside)
        except OSError as e:
            _log.warning("the damaged checkpoint %s could not be set aside: %s", self.folder(step), e)

    def _folders(self) -> list[Path]:
        return [p for p in self.directory.iterdir() if p.is_dir()] if self.directory.is_dir() else []
