import multiprocessing
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection

import jax
import numpy as np

from pippin.core import processes
from pippin.core.errors import ConfigError, DataError, PippinError

PROCESSES = 2

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["jax", "pippin.core.processes"])


def fail(process: int, error: Exception) -> None:
    if jax.process_index() == process:
        raise error


def told(action: Callable[[], object]) -> str:
    """What a mistake is told as."""
    try:
        action()
    except (PippinError, OSError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def run_process(process: int, port: int, report: Connection) -> None:
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, process, cluster_detection_method="deactivate")
    report.send(
        [
            processes.is_first(),
            processes.gather(bytes([process])),
            processes.total(np.array([process, 1e-12])).tolist(),
            processes.together(lambda: process),
            told(lambda: processes.together(lambda: fail(1, DataError("no such file")))),
            told(lambda: processes.together(lambda: fail(1, OSError("disk")))),
            told(lambda: processes.first_alone(lambda: fail(0, ConfigError("taken")))),
            told(lambda: processes.require_same("the text", bytes([process]))),
            told(lambda: processes.require_same("the text", b"equal")),
        ]
    )
    jax.distributed.shutdown()


def test_what_fails_on_one_process_fails_on_all() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    started = []
    for process in range(PROCESSES):
        receive, send = forkserver.Pipe(duplex=False)
        running = forkserver.Process(target=run_process, args=(process, port, send))
        running.start()
        send.close()
        started.append((running, receive))
    first, second = [receive.recv() for _, receive in started]
    for running, _ in started:
        running.join()
        assert running.exitcode == 0
    differs = (
        "ConfigError: the text of process 1 is not that of process 0, so that they would not train as one. "
        "Start all of them with the same command, the same version of pippin and the same data."
    )
    everyone = [b"\x00", b"\x01"]
    assert first[:4] == [True, everyone, [1.0, 2e-12], 0]
    assert second[:4] == [False, everyone, [1.0, 2e-12], 1]
    # The process where it failed has its own error; the other says where it was.
    assert first[4:] == [
        "DataError: process 1: no such file",
        "PippinError: process 1: disk",
        "ConfigError: taken",
        differs,
        "",
    ]
    assert second[4:] == [
        "DataError: no such file",
        "OSError: disk",
        "ConfigError: process 0: taken",
        differs,
        "",
    ]


def test_one_process_is_alone_with_itself() -> None:
    assert processes.is_first() and processes.gather_text("é") == ["é"]
    assert processes.together(lambda: 3) == 3
    processes.require_same("anything", b"")
