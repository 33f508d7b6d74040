"""The processes of a job on this machine: started together, watched, and ended together.

What each prints is in DIR/process-I.log; what the first prints is shown as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pippin.core.errors import ConfigError
from pippin.train.cluster import environment
from pippin.train.cluster.exit_codes import Outcome, describe, outcome_of

_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder each
_HERE = "127.0.0.1"
_POLL_S = 0.1
_NOISE = b"[Gloo] Rank "  # which JAX prints at the first collective on CPUs
_LAST_LINES = 15  # of the log of a process that failed


def run_local(
    command: Sequence[str],
    num_processes: int,
    *,
    logs: Path,
    max_restarts: int = 0,
    grace_s: float = 5.0,
    stop_grace_s: float = 600.0,
) -> Outcome:
    """Runs a command as several processes of one job, and again where it was cut off.

    SIGTERM and SIGINT are passed on, so that the job stops after the same step everywhere and saves; at a second one
    it is killed.

    Args:
        command: what each process runs; the environment says which of them it is.
        num_processes: on this machine.
        logs: the directory of the logs; made if it is not there.
        max_restarts: how often to start again where a process was lost.
        grace_s: how long the others may take to end after one has failed, before they are killed.
        stop_grace_s: the same where one was asked to stop, and saved.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _Signals() as signals:
        for restarts in range(max_restarts + 1):
            outcome = _Attempt(command, num_processes, logs, signals).run(grace_s, stop_grace_s)
            if outcome is not Outcome.RETRYABLE or signals.received:
                return outcome
            if restarts < max_restarts:
                _say(f"starting again ({restarts + 1} of {max_restarts} restarts)")
    if max_restarts:
        _say(f"the budget of {max_restarts} restarts is used up")
    return Outcome.RETRYABLE


def local_devices(num_processes: int, env: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """What each process's environment says of the devices that are its own.

    Raises:
        ConfigError: the GPUs cannot be shared evenly.
    """
    gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() and env.get("JAX_PLATFORMS") != "cpu" else 0
    if gpus % num_processes:
        raise ConfigError(
            f"{num_processes} processes cannot share {gpus} GPUs: each gets equally many. Start as many as there are "
            "GPUs, or fewer that divide them; or set JAX_PLATFORMS=cpu."
        )
    each = gpus // num_processes
    spans = [range(i * each, (i + 1) * each) for i in range(num_processes)]
    return [{"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, span))} if span else {} for span in spans]


class _Attempt:
    """One start of the processes, up to the end of the last."""

    def __init__(self, command: Sequence[str], num_processes: int, logs: Path, signals: _Signals):
        self._signals, self._logs = signals, logs
        coordinator = f"{_HERE}:{environment.free_port(_HERE)}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._killed = False  # those that had not ended with the others
        for i, devices in enumerate(local_devices(num_processes)):
            own = {
                environment.COORDINATOR: coordinator,
                environment.NUM_PROCESSES: str(num_processes),
                environment.PROCESS_ID: str(i),
                environment.PARENT: str(os.getpid()),
            }
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **devices, **own},
                start_new_session=True,  # an interrupt at the terminal is for this process to pass on
            )
            self._processes.append(process)
            self._read(i, process)

    def run(self, grace_s: float, stop_grace_s: float) -> Outcome:
        """Waits for the end of all."""
        passed_on = 0
        deadline: float | None = None
        first: tuple[int, int] | None = None  # the process that failed or stopped first, and its status
        while None in [p.poll() for p in self._processes]:  # a list: each is asked
            if self._signals.received > passed_on:
                passed_on += 1
                self._send(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
            ended = [(i, p.returncode) for i, p in enumerate(self._processes) if p.returncode]
            if ended and first is None:
                first = ended[0]
                stopped = outcome_of(first[1]) is Outcome.PREEMPTED
                deadline = time.monotonic() + (stop_grace_s if stopped else grace_s)
            if deadline is not None and time.monotonic() > deadline:
                self._killed = True
                self._send(signal.SIGKILL)
            time.sleep(_POLL_S)
        for reader in self._readers:
            reader.join()
        first = first or next(
            ((i, p.returncode) for i, p in enumerate(self._processes) if p.returncode), None
        )
        if first is None:
            return Outcome.DONE
        return self._tell(*first)

    def _tell(self, index: int, status: int) -> Outcome:
        """What became of the job, by the process that ended it; says so where the first has not."""
        outcome = outcome_of(status)
        asked = outcome is Outcome.PREEMPTED
        if asked and any(
            outcome_of(p.returncode) not in (Outcome.PREEMPTED, Outcome.DONE) for p in self._processes
        ):
            _say("not every process stopped as it was asked to; the last checkpoint is what is saved")
        if not asked and (self._killed or self._processes[0].returncode != status) and index:
            log = self._log(index)
            _say(f"process {index} {describe(status)}, and ended the job. The end of {log}:")
            for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
                print(f"  {line}", file=sys.stderr)
        elif status < 0 and not asked:
            _say(f"process {index} {describe(status)}, and ended the job")
        return outcome

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _log(self, index: int) -> Path:
        return self._logs / f"process-{index}.log"

    def _read(self, index: int, process: subprocess.Popen[bytes]) -> None:
        for pipe, shown in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            words = (pipe, self._log(index), shown if index == 0 else None)
            thread = threading.Thread(target=_copy, args=words, daemon=True)
            thread.start()
            self._readers.append(thread)


class _Signals:
    """Counts SIGTERM and SIGINT while the block runs."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:  # noqa: PYI034  the checks of annotations in tests refuse Self
        if threading.current_thread() is threading.main_thread():  # signals reach it alone
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: Any) -> None:
        self.received += 1


def _copy(pipe: IO[bytes], path: Path, shown: Any) -> None:
    """Appends each line of a pipe to a file, and shows it."""
    with pipe, path.open("ab", buffering=0) as log:
        for line in iter(pipe.readline, b""):
            log.write(line)
            if shown is not None and not line.startswith(_NOISE):
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    shown.write(line.decode(errors="replace"))
                    shown.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
