"""The exit codes of a job's processes, and what each means for the job. Those above 64 are of sysexits.h."""

from __future__ import annotations

import signal
from enum import StrEnum

DONE = 0
FATAL = 1  # a mistake in the program: it would happen again
ERROR = 2  # something that the user can put right: the message says what
UNAVAILABLE = 69  # a process, a device or the network was lost: the same command may succeed
PREEMPTED = 75  # asked to stop, and saved: run it again to go on

_BY_REQUEST = (signal.SIGTERM, signal.SIGINT)


class Outcome(StrEnum):
    """How a process or a job ended."""

    DONE = "done"
    FATAL = "fatal"
    ERROR = "error"
    RETRYABLE = "retryable"
    PREEMPTED = "preempted"

    @property
    def exit_code(self) -> int:
        """What a command returns that ended so."""
        return {
            Outcome.DONE: DONE,
            Outcome.FATAL: FATAL,
            Outcome.ERROR: ERROR,
            Outcome.RETRYABLE: UNAVAILABLE,
            Outcome.PREEMPTED: PREEMPTED,
        }[self]


def outcome_of(status: int) -> Outcome:
    """What an exit status means: of `subprocess` (a signal is negative) or of a shell (it is added to 128).

    A process that was killed, by the kernel for want of memory for instance, may succeed when it is run again. One that
    was ended by the signal that asks to stop had nothing to save yet.
    """
    number = -status if status < 0 else status - 128
    if number > 0:
        return Outcome.PREEMPTED if number in _BY_REQUEST else Outcome.RETRYABLE
    known = {o.exit_code: o for o in Outcome}
    return known.get(status, Outcome.FATAL)


def describe(status: int) -> str:
    """An exit status in words, such as "was killed by SIGKILL" or "ended with exit code 2"."""
    number = -status if status < 0 else status - 128
    if number <= 0:
        return f"ended with exit code {status}"
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit code {status}"
