"""Jobs of two processes, started as a user starts them, beside the same jobs of one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from google.protobuf import text_format

from pippin.core.config_tree import override
from pippin.train import loop
from pippin.train.run_directory import RunDirectory
from pippin.train.toy import CountingInput, toy_config
from pippin.v1 import job_pb2 as pb

# Two key heads, so that a tensor axis of 2 can split them.
_CHANGES = {"model.decoder.layer.attention.num_kv_heads": 2}
_RECIPES = f"""
from pippin.core.config_tree import override
from pippin.train.recipe import recipe
from pippin.train.toy import toy_config

def make(**fields):
    return override(toy_config(steps=12, **fields), {_CHANGES})

@recipe
def quick():
    "As fast as it goes."
    return make()

@recipe
def slow():
    "So that there is time to interrupt it."
    return make(seconds_a_batch=0.25)

@recipe
def failing():
    "Its input fails."
    return make(fails_at=6)
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "mine.py"
    path.write_text(_RECIPES)
    return path


def start(recipes: Path, recipe: str, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pippin.train.launch", "--recipe-file", str(recipes)]
    command += ["--recipe", recipe, "--out", str(out), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a job printed; it ended with this code, and left no process behind."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == code, printed
    return printed


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def final_state(run: RunDirectory) -> Any:
    """The whole training state of a finished toy, gradients' moments included, and the digest of its samples."""
    cfg = override(toy_config(steps=12), _CHANGES)
    trainer = cfg.build(held_out=lambda most, task: ())
    with cfg.checkpointer.build(
        directory=run.checkpoints, component=cfg.model, parameters=trainer.parameter_paths
    ) as checkpointer:
        state, samples, notes = loop.restore(trainer, checkpointer, CountingInput(cfg.input))
    assert not notes
    return state, samples


@pytest.fixture(scope="module")
def one_process(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    out = tmp_path_factory.mktemp("runs") / "one"
    finish(start(recipes, "quick", out))
    return RunDirectory(out)


def require_same_training(run: RunDirectory, other: RunDirectory) -> None:
    lines, others = run.read_metrics(), other.read_metrics()
    assert [(m["kind"], m["step"]) for m in lines] == [(m["kind"], m["step"]) for m in others]
    # Two devices add up their parts of a sum in another order: a few float32 roundings in each of twelve Adam steps.
    for name in ("loss", "cross_entropy", "grad_norm", "perplexity"):
        pairs = [(a[name], b[name]) for a, b in zip(lines, others, strict=True) if name in a]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)
    (state, samples), (theirs, their_samples) = final_state(run), final_state(other)
    assert samples == their_samples and len(samples) == 32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state, theirs)


@pytest.mark.parametrize(
    "mesh",
    [
        (),
        ("mesh.data=1", "mesh.fsdp=2"),
        # Processes on CPUs count as machines, over which a tensor axis goes only if it is asked to.
        ("mesh.data=1", "mesh.tensor=2", "mesh.across=tensor"),
    ],
)
def test_two_processes_train_as_one_does(
    recipes: Path, one_process: RunDirectory, tmp_path: Path, mesh: tuple[str, ...]
) -> None:
    options = [word for change in mesh for word in ("--set", change)]
    printed = finish(start(recipes, "quick", tmp_path / "two", "-n", "2", *options))
    assert "2 x cpu in 2 processes" in printed
    assert printed.count("held-out perplexity, a token") == 1  # the first process alone speaks
    run = RunDirectory(tmp_path / "two")
    require_same_training(run, one_process)
    record = text_format.Parse(run.record.read_text(), pb.RunRecord())
    assert (record.outcome, record.last_step) == (pb.RUN_OUTCOME_COMPLETED, 12)
    assert "Rank 1" in (run.logs / "process-1.log").read_text()


def test_a_stop_of_one_process_stops_both_at_one_step_and_either_number_goes_on(
    recipes: Path, one_process: RunDirectory, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(recipes, "slow", out, "-n", "2")
    wait_for(out / "checkpoints" / "4", process)
    os.kill(children(process)[1], signal.SIGTERM)
    printed = finish(process, code=75)
    stopped = re.search(r"stopped by a signal after step (\d+)", printed)
    assert stopped, printed
    assert stopped[0] in (out / "logs" / "process-1.log").read_text()
    assert (out / "checkpoints" / stopped[1]).is_dir()
    record = text_format.Parse(RunDirectory(out).record.read_text(), pb.RunRecord())
    assert record.outcome == pb.RUN_OUTCOME_PREEMPTED
    for n in ("1", "2"):
        again = tmp_path / f"with-{n}"
        shutil.copytree(out, again)
        printed = finish(start(recipes, "slow", again, "-n", n))
        assert f"from the checkpoint of step {stopped[1]}" in printed
        require_same_training(RunDirectory(again), one_process)


def test_a_killed_process_ends_the_job_and_the_next_one_goes_on(
    recipes: Path, one_process: RunDirectory, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(recipes, "slow", out, "-n", "2")
    wait_for(out / "checkpoints" / "4" / "manifest.textproto", process)
    both = children(process)
    os.kill(both[1], signal.SIGKILL)
    killed = time.monotonic()
    assert "process 1 was killed by SIGKILL, and ended the job" in finish(process, code=69)
    assert time.monotonic() - killed < 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    process = start(recipes, "slow", out, "-n", "2", "--max-restarts", "1")
    wait_for(out / "checkpoints" / "8" / "manifest.textproto", process)
    os.kill(children(process)[0], signal.SIGKILL)
    printed = finish(process)
    assert "from the checkpoint of step 4" in printed
    assert "starting again (1 of 1 restarts)" in printed and "from the checkpoint of step 8" in printed
    require_same_training(RunDirectory(out), one_process)


def test_a_mistake_of_the_users_is_told_once_and_ends_all(recipes: Path, tmp_path: Path) -> None:
    printed = finish(start(recipes, "failing", tmp_path / "run", "-n", "2", "--max-restarts", "3"), code=2)
    assert printed.count("error: the toy input was told to fail") == 1
    assert "Traceback" not in printed and "starting again" not in printed
    printed = finish(start(recipes, "quick", tmp_path / "odd", "-n", "3"), code=2)
    assert "cannot be split 3 ways" in printed and "Traceback" not in printed
