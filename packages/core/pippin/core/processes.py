"""What the processes of a job do together. All of them make the same calls, in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from pippin.core import errors
from pippin.core.errors import ConfigError, PippinError

_MOST_BYTES = 4096  # of the text that a process tells the others


def is_first() -> bool:
    """Whether this is the process that writes what a job has one of; true where there is one process."""
    return jax.process_index() == 0


def gather(data: bytes) -> list[bytes]:
    """The bytes of every process, in the order of the processes; each gives equally many."""
    if jax.process_count() == 1:
        return [data]
    everyone = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    return [row.tobytes() for row in everyone]


def gather_text(text: str) -> list[str]:
    """The text of every process, in the order of the processes, each cut off after 4096 bytes."""
    padded = text.encode()[:_MOST_BYTES].ljust(_MOST_BYTES, b"\0")
    return [data.rstrip(b"\0").decode(errors="ignore") for data in gather(padded)]


def total(values: np.ndarray) -> np.ndarray:
    """The sum over all processes, in float64."""
    rows = gather(values.astype(np.float64).tobytes())
    return np.sum([np.frombuffer(row, np.float64) for row in rows], axis=0)


def together[T](action: Callable[[], T]) -> T:
    """What `action` gives here, once it was done on all processes: where it fails on one, it fails on all.

    So a mistake that one process alone can see, such as a file that is not on its machine, ends all of them with the
    same error, rather than one with the error and the others in a collective that never ends.

    Raises:
        Exception: what the action raised here; else, of the first process where it failed, a PippinError of the same
            kind.
    """
    if jax.process_count() == 1:
        return action()
    results: list[T] = []
    failed, text = None, ""
    try:
        results.append(action())
    except Exception as e:  # noqa: BLE001  raised again below, when the others know
        failed, text = e, f"{type(e).__name__}\n{e}"
    told = gather_text(text)
    if failed is not None:
        raise failed
    for process, other in enumerate(told):
        if other:
            name, _, message = other.partition("\n")
            kind = getattr(errors, name, PippinError)
            raise kind(f"process {process}: {message}")
    return results[0]


def first_alone(action: Callable[[], object]) -> None:
    """Does something on the first process, while the others wait.

    Raises:
        Exception: as `together`.
    """
    together(lambda: action() if is_first() else None)


def require_same(what: str, value: bytes) -> None:
    """Raises `ConfigError` unless all processes have the same value; `what` names it in the message."""
    digests = gather(hashlib.sha256(value).digest())
    others = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(
            f"{what} of process {', '.join(map(str, others))} is not that of process 0, so that they would not train as "
            "one. Start all of them with the same command, the same version of pippin and the same data."
        )
