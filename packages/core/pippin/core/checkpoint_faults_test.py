"""Checkpoints under kill -9 and on a full disk. Each fault happens in a process of its own."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.checkpoint import Checkpointer
from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.errors import CheckpointError

COMPONENT = CheckpointerConfig()  # any config will do
ROUNDS = 16
SHAPE = (64, 64)
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}

# Its processes have JAX imported and no devices yet, so each starts in a moment.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["jax", "orbax.checkpoint", "pippin.core.checkpoint"])


def open_checkpointer(directory: Path) -> Checkpointer:
    return CheckpointerConfig(keep_last=2).build(directory=directory, component=COMPONENT)


def make_state(step: int) -> dict:
    return {
        "params": {f"w{i}": jnp.full(SHAPE, step + i, jnp.float32) for i in range(4)},
        "step": jnp.int32(step),
    }


def is_state(state: dict, step: int) -> bool:
    return all(
        bool(np.all(a == b))
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True)
    )


def die_at_random(seed: int) -> None:
    """Has this process killed: at some file operation, or at some time."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        threading.Timer(rng.uniform(0, 0.1), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return
    left = rng.randrange(120)

    def count(event: str, _: tuple) -> None:
        nonlocal left
        if event in FILE_EVENTS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def load_then_save_until_killed(directory: Path, seed: int, report: Connection) -> None:
    with open_checkpointer(directory) as checkpointer:
        restored = checkpointer.load(make_state(0))
        step = restored.step if restored else 0
        whole = restored is None or (is_state(restored.state, step) and not restored.skipped)
        report.send((step, whole, sorted(p.name for p in directory.iterdir() if not p.name.isdecimal())))
        state = make_state(step + 1)
        die_at_random(seed)
        while True:
            step += 1
            checkpointer.save(step, state, {"input": b"%d" % step})
            state = make_state(step + 1)
            checkpointer.wait()
            report.send(step)


def test_kill_at_any_point_of_a_save_leaves_the_last_step_whole(tmp_path):
    acknowledged = 0
    steps_done = set()
    for seed in range(ROUNDS):
        receive, send = processes.Pipe(duplex=False)
        process = processes.Process(target=load_then_save_until_killed, args=(tmp_path, seed, send))
        process.start()
        send.close()
        step, whole, others = receive.recv()
        assert whole, seed
        assert others == [".lease"], seed
        assert acknowledged <= step <= acknowledged + 1, seed
        acknowledged = step
        try:
            while True:
                acknowledged = receive.recv()
        except EOFError:
            pass
        process.join()
        assert process.exitcode == -signal.SIGKILL, seed
        steps_done.add(acknowledged)
    assert len(steps_done) > 3  # the kills came at different stages of different steps


def save_where_no_file_may_grow(directory: Path, report: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open_checkpointer(directory) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.wait()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHAPE[0] * SHAPE[1] * 2, hard))
        checkpointer.save(2, make_state(2))
        steps = 0
        error = ""
        while not error and steps < 100:
            time.sleep(0.1)  # a step of training
            steps += 1
            try:
                checkpointer.check()
            except CheckpointError as e:
                error = str(e)
        there = sorted(p.name for p in directory.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        checkpointer.check()
        checkpointer.save(2, make_state(2))
        restored = checkpointer.load(make_state(0))
        assert restored is not None
        report.send((error, there, restored.step, is_state(restored.state, 2)))


def test_a_write_that_fails_in_the_background_is_raised_by_the_next_check(tmp_path):
    receive, send = processes.Pipe(duplex=False)
    process = processes.Process(target=save_where_no_file_may_grow, args=(tmp_path, send))
    process.start()
    send.close()
    error, there, step, whole = receive.recv()
    process.join()
    assert error.startswith(f"step 2 was not saved to {tmp_path}: ")
    assert "File too large" in error
    assert "Earlier checkpoints are as they were. Make room" in error
    assert there == [".lease", "1"]
    assert (step, whole) == (2, True)
    assert process.exitcode == 0


def fill_disk(directory: Path) -> None:
    """Saves to a full disk, then with room again; prints the error and what is there."""
    with open_checkpointer(directory) as checkpointer:
        filler = directory / "filler"
        checkpointer.save(1, make_state(1))
        checkpointer.wait()
        filler.write_bytes(bytes(shutil.disk_usage(directory).free - 40_000))
        try:
            checkpointer.save(2, make_state(2))
        except CheckpointError as e:
            print(e)
        filler.unlink()
        checkpointer.save(2, make_state(2))
        checkpointer.wait()
        print(sorted(p.name for p in directory.iterdir()))


def test_a_full_disk_is_raised_by_save_itself(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=700k none {tmp_path}"
    tried = subprocess.run([*namespace, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted here: {tried.stderr.strip()}")
    program = f"import pathlib, {__name__} as m; m.fill_disk(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [*namespace, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    error, there = done.stdout.splitlines()
    assert error.startswith(f"step 2 was not saved to {tmp_path}: [Errno 28] No space left on device: ")
    assert there == "['.lease', '1', '2']"
