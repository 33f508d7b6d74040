import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import parse_target
from pippin.train.cluster import ray_jobs
from pippin.train.cluster.backend import ClusterError, Phase
from pippin.train.cluster.exit_codes import ERROR, Outcome
from pippin.train.cluster.launch_spec import LaunchSpec
from pippin.train.cluster.ray_jobs import RayBackend, ray_job

_RECIPES = """
from pippin.train.recipe import recipe
from pippin.train.toy import toy_config

@recipe
def whole():
    "A few seconds."
    return toy_config(steps=4)

@recipe
def failing():
    "Its input fails."
    return toy_config(steps=4, fails_at=2)
"""


def spec(target: str | None = None, **fields: Any) -> LaunchSpec:
    standard = {"name": "job", "arguments": ("--recipe", "r"), "out": "/runs/job"}
    return LaunchSpec(target=parse_target(target) if target else None, **(standard | fields))


def test_a_worker_is_a_host() -> None:
    assert ray_job(spec(num_processes=2)).scaling == {"num_workers": 2}
    assert ray_job(spec("gpu-h100-16")).scaling == {
        "num_workers": 2,
        "use_gpu": True,
        "resources_per_worker": {"GPU": 8},
    }
    assert ray_job(spec("tpu-v6e-16")).scaling == {
        "num_workers": 4,
        "use_tpu": True,
        "accelerator_type": "TPU-V6E",
        "topology": "4x4",
        "resources_per_worker": {"TPU": 4},
    }


def test_what_is_shown_is_what_the_driver_reads() -> None:
    job = spec(num_processes=2, env={"A": "1"})
    assert json.loads(RayBackend().render(job)) == dataclasses.asdict(ray_job(job))


def test_what_ray_does_not_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="got the image 'x'"):
        ray_job(spec(image="x"))
    with pytest.raises(ConfigError, match="got no --address"):
        RayBackend().status("job")


def test_ray_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="Ray is not installed"):
        RayBackend().submit(spec())


@pytest.mark.parametrize(
    ("said", "phase", "outcome"),
    [
        ("Status for job 'job': RUNNING\n", Phase.RUNNING, None),
        ("Status for job 'job': PENDING\n", Phase.PENDING, None),
        ("Job 'job' succeeded: SUCCEEDED", Phase.ENDED, Outcome.DONE),
        ("Job 'job' was STOPPED", Phase.ENDED, Outcome.PREEMPTED),
        ("Job 'job' FAILED: exit code 2", Phase.ENDED, Outcome.ERROR),
        ("Job 'job' FAILED: worker crashed", Phase.ENDED, Outcome.RETRYABLE),
    ],
)
def test_rays_words_are_understood(
    monkeypatch: pytest.MonkeyPatch, said: str, phase: Phase, outcome: Outcome | None
) -> None:
    monkeypatch.setattr(ray_jobs, "_ray_job", lambda *arguments: said)
    status = RayBackend("http://127.0.0.1:8265").status("job")
    assert (status.phase, status.outcome) == (phase, outcome)


def run(tmp_path: Path, recipe: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "recipes.py").write_text(_RECIPES)
    command = [sys.executable, "-m", "pippin.train.launch", "--recipe-file", str(tmp_path / "recipes.py")]
    command += ["--recipe", recipe, "--backend", "ray", "-n", "2", "--out", str(tmp_path / recipe)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: requirements_ray.lock"
)
def test_two_workers_train_and_a_mistake_is_told_by_the_exit_code(tmp_path: Path) -> None:
    done = run(tmp_path, "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole: done" in done.stdout
    assert (tmp_path / "whole" / "checkpoints" / "4").is_dir()
    record = (tmp_path / "whole" / "record.textproto").read_text()
    assert re.search(r'devices: "2 x cpu in 2 processes"', record)
    failed = run(tmp_path, "failing")
    assert failed.returncode == ERROR, failed.stdout + failed.stderr
    assert "the toy input was told to fail" in failed.stdout + failed.stderr
