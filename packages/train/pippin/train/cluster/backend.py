"""What every cluster backend does, and how it calls its engine's own client."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, runtime_checkable

from pippin.core.errors import ConfigError
from pippin.train.cluster.exit_codes import Outcome
from pippin.train.cluster.launch_spec import LaunchSpec


class ClusterError(ConfigError):
    """The engine's client is not there, or refused what it was asked."""


class Phase(StrEnum):
    """Where a job is."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """A job as its engine tells of it."""

    phase: Phase
    detail: str  # in the engine's words
    outcome: Outcome | None = None  # once it has ended

    def text(self, name: str) -> str:
        """One line."""
        return f"{name}: {self.outcome or self.phase} ({self.detail})"


@runtime_checkable
class Backend(Protocol):
    """A cluster's engine."""

    def render(self, spec: LaunchSpec) -> str:
        """What is submitted, as text. Raises `ConfigError` where the engine cannot run it."""
        ...

    def submit(self, spec: LaunchSpec) -> JobStatus:
        """Submits it; how it is then."""
        ...

    def status(self, name: str) -> JobStatus:
        """How a job is."""
        ...

    def logs(self, name: str, process: int) -> str:
        """What one of its processes printed."""
        ...

    def cancel(self, name: str) -> str:
        """Ends it; returns what the engine says."""
        ...


def call(command: Sequence[str], remedy: str, stdin: str | None = None) -> str:
    """What an engine's client prints.

    Raises:
        ClusterError: it is not installed (`remedy` says what to do), or failed.
    """
    if shutil.which(command[0]) is None:
        raise ClusterError(f"{command[0]} is not on PATH, and this backend submits with it. {remedy}")
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise ClusterError(
            f"{' '.join(command[:2])} failed with exit code {done.returncode}: {' '.join(words)}"
        )
    return done.stdout
