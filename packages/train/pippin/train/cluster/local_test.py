import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import ConfigError
from pippin.train.cluster import local
from pippin.train.cluster.exit_codes import Outcome
from pippin.train.cluster.local import local_devices, run_local

_START = "import os, signal, sys, time; i = int(os.environ['PIPPIN_PROCESS_ID']); "


def run(tmp_path: Path, program: str, n: int = 2, **options: Any) -> Outcome:
    return run_local([sys.executable, "-c", _START + program], n, logs=tmp_path / "logs", **options)


def log(tmp_path: Path, process: int) -> str:
    return (tmp_path / "logs" / f"process-{process}.log").read_text()


def test_each_process_learns_which_it_is_and_has_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "print(i, 'of', os.environ['PIPPIN_NUM_PROCESSES'], os.environ['PIPPIN_COORDINATOR'])"
    assert run(tmp_path, program) is Outcome.DONE
    first, second = log(tmp_path, 0), log(tmp_path, 1)
    assert first.startswith("0 of 2 127.0.0.1:") and second == "1" + first[1:]
    assert capsys.readouterr().out == first  # what the first process prints is shown


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("sys.exit(0)", Outcome.DONE),
        ("sys.exit(2)", Outcome.ERROR),
        ("sys.exit(75)", Outcome.PREEMPTED),
        ("sys.exit(69)", Outcome.RETRYABLE),
        ("raise KeyError('a mistake')", Outcome.FATAL),
        ("os.kill(os.getpid(), signal.SIGSEGV)", Outcome.RETRYABLE),
        ("os.kill(os.getpid(), signal.SIGTERM)", Outcome.PREEMPTED),
    ],
)
def test_the_end_of_the_processes_is_the_end_of_the_job(
    tmp_path: Path, program: str, outcome: Outcome
) -> None:
    assert run(tmp_path, program) is outcome


def test_a_process_that_is_killed_ends_the_others_which_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "print('last words', flush=True); os.kill(os.getpid(), 9) if i else time.sleep(60)"
    started = time.monotonic()
    assert run(tmp_path, program, grace_s=0.5) is Outcome.RETRYABLE
    assert time.monotonic() - started < 30
    told = capsys.readouterr().err
    assert "process 1 was killed by SIGKILL, and ended the job. The end of" in told and "  last words" in told


def test_a_lost_process_is_started_again_within_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        f"n = {str(tmp_path / 'attempts')!r} + str(i); open(n, 'a').write('x'); "
        "sys.exit(0 if len(open(n).read()) == 3 else 69)"
    )
    assert run(tmp_path, program, max_restarts=1) is Outcome.RETRYABLE
    assert "the budget of 1 restarts is used up" in capsys.readouterr().err
    assert run(tmp_path, program, max_restarts=1) is Outcome.DONE


def test_a_mistake_of_the_users_is_not_tried_again(tmp_path: Path) -> None:
    program = f"open({str(tmp_path / 'attempts')!r}, 'a').write('x'); sys.exit(2)"
    assert run(tmp_path, program, n=1, max_restarts=3) is Outcome.ERROR
    assert (tmp_path / "attempts").read_text() == "x"


def test_a_request_to_stop_reaches_all_processes_and_is_no_reason_to_start_again(tmp_path: Path) -> None:
    program = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    )

    def ask() -> None:
        while not all((tmp_path / "logs" / f"process-{i}.log").exists() and log(tmp_path, i) for i in (0, 1)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    assert run(tmp_path, program, max_restarts=3) is Outcome.PREEMPTED


def test_gpus_are_shared_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        (tmp_path / str(i)).mkdir()
    monkeypatch.setattr(local, "_GPUS", tmp_path)
    assert local_devices(2, {}) == [{"JAX_LOCAL_DEVICE_IDS": "0,1"}, {"JAX_LOCAL_DEVICE_IDS": "2,3"}]
    assert local_devices(3, {"JAX_PLATFORMS": "cpu"}) == [{}, {}, {}]
    with pytest.raises(ConfigError, match="3 processes cannot share 4 GPUs"):
        local_devices(3, {})
