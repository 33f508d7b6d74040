"""Which of a job's processes this is, by its environment: ours, or that of a cluster that JAX knows.

    PIPPIN_COORDINATOR     host:port of the first process; `auto`: JAX finds out all three
    PIPPIN_NUM_PROCESSES   how many there are
    PIPPIN_PROCESS_ID      which of them this is, from 0
    PIPPIN_PARENT          the process that watches this one: this one ends when that one does

Without ours, a process that SLURM's srun, Open MPI's mpirun or a TPU slice on Kubernetes started as one of several
asks JAX.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping

from pippin.core.errors import ConfigError
from pippin.train.cluster.exit_codes import DONE, FATAL, PREEMPTED

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "PIPPIN_COORDINATOR", "PIPPIN_NUM_PROCESSES", "PIPPIN_PROCESS_ID"
PARENT = "PIPPIN_PARENT"

_PARENT_POLL_S = 1.0


def is_one_of_several(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the job has other processes than this one. No JAX."""
    if COORDINATOR in env:
        return env[COORDINATOR] == "auto" or _number(env, NUM_PROCESSES) > 1
    slurm = all(f"SLURM_{name}" in env for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"))
    return (
        (slurm and env["SLURM_NTASKS"] != "1")
        or env.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or env.get("MEGASCALE_NUM_SLICES", "1") != "1"
    )


def join() -> bool:
    """Connects this process to the others of its job, before JAX is used; whether there are others.

    Raises:
        ConfigError: the environment does not say which process this is, or the others cannot be reached.
    """
    env = os.environ
    if PARENT in env:
        _end_with(_number(env, PARENT))
    if not is_one_of_several():
        return _is_joined()
    own = env.get(COORDINATOR, "auto") != "auto"
    count, index = (_number(env, NUM_PROCESSES), _number(env, PROCESS_ID)) if own else (0, 0)
    if own and not 0 <= index < count:
        raise ConfigError(
            f"{PROCESS_ID} is {index} and {NUM_PROCESSES} is {count}: processes are numbered from 0 to one less than "
            "their number. Give each its own number."
        )
    import jax

    if jax.distributed.is_initialized():  # by what started this process, such as Ray
        return True
    try:
        if own:
            # Otherwise JAX would ask a cluster which of the devices are for this process.
            jax.distributed.initialize(env[COORDINATOR], count, index, cluster_detection_method="deactivate")
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as e:
        where = f" at {env[COORDINATOR]}" if own else ""
        raise ConfigError(
            f"the processes of this job did not find each other{where}: {str(e).splitlines()[0]} Start all of them within "
            f"five minutes, and see that each can reach the first (or set {COORDINATOR}, {NUM_PROCESSES} and "
            f"{PROCESS_ID})."
        ) from e
    return True


def run_as_one(command: Callable[[], int], at_end: Callable[[int], None] | None = None) -> int:
    """The exit code of a command that may be one of a job's processes.

    When one of several fails, the others are in the middle of a step with it. JAX would have it wait for them, and they
    wait for it: so it ends at once; `at_end` gets a code other than 0 before that.
    """
    try:
        code = command()
    except Exception:
        if not _is_joined():
            raise
        traceback.print_exc()
        code = FATAL
    if code and at_end:
        at_end(code)
    if _is_joined():
        if code in (DONE, PREEMPTED):
            sys.modules["jax"].distributed.shutdown()
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def free_port(host: str = "") -> int:
    """A port of this machine, or of one of its addresses, for a coordinator to listen on."""
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def _is_joined() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ConfigError(
            f"{name} is {env.get(name, 'not set')}, and must be a number where {COORDINATOR} is set. Set both, or "
            "neither."
        ) from None


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(FATAL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
