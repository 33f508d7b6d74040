"""Checkpoints of a job of two processes."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pippin.core.checkpoint import Checkpointer
from pippin.core.checkpoint_config import CheckpointerConfig

COMPONENT = CheckpointerConfig()  # any config will do
PROCESSES = 2
SPECS = {"both": ("a", "b"), "first": ("a",), "second": (None, "b"), "none": ()}

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["jax", "orbax.checkpoint", "pippin.core.checkpoint"])


def open_checkpointer(directory: Path) -> Checkpointer:
    return CheckpointerConfig(timeout_s=20.0).build(directory=directory, component=COMPONENT)


def values(name: str, step: int) -> np.ndarray:
    return np.arange(32, dtype=np.float32).reshape(8, 4) + 100 * step + len(name)


def template(rows: int) -> dict:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(rows, -1), ("a", "b"))
    like = {name: NamedSharding(mesh, P(*spec)) for name, spec in SPECS.items()}
    return {
        name: jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding) for name, sharding in like.items()
    }


def make_state(step: int, rows: int) -> dict:
    def make(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: values(name, step)[index]
        )

    return {name: make(name, like) for name, like in template(rows).items()}


def is_state(state: dict, step: int) -> bool:
    return all(
        bool(np.all(np.asarray(shard.data) == values(name, step)[shard.index]))
        for name, array in state.items()
        for shard in array.addressable_shards
    )


def run_process(process: int, port: int, directory: Path, report: Connection) -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, process)
    with open_checkpointer(directory) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step, rows=2), {"input": b"state"})
        checkpointer.wait()
        newest = checkpointer.load(template(rows=4))
        assert newest is not None
        if process == 0:  # damages what the other process wrote, and only it reads again
            path = directory / "3/arrays/first/c/1/0"
            data = bytearray(path.read_bytes())
            data[5] ^= 1
            path.write_bytes(data)
        multihost_utils.sync_global_devices("damaged")
        older = checkpointer.load(template(rows=2))
        assert older is not None
        results = [
            (r.step, is_state(r.state, r.step), [s.problems for s in r.skipped]) for r in (newest, older)
        ]
    report.send(results)
    jax.distributed.shutdown()


def test_processes_save_and_load_together(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    started = []
    for process in range(PROCESSES):
        receive, send = processes.Pipe(duplex=False)
        running = processes.Process(target=run_process, args=(process, port, tmp_path, send))
        running.start()
        send.close()
        started.append((running, receive))
    results = [receive.recv() for _, receive in started]
    for running, _ in started:
        running.join()
        assert running.exitcode == 0
    problem = "arrays/first/c/1/0: the values do not match their SHA-256"
    assert results == [[(3, True, []), (2, True, [(problem,)])]] * PROCESSES
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lease", "1", "2", "3.damaged"]

    with open_checkpointer(tmp_path) as checkpointer:  # and one process goes on
        restored = checkpointer.load(template(rows=1))
    assert restored is not None
    assert (restored.step, is_state(restored.state, 2)) == (2, True)
