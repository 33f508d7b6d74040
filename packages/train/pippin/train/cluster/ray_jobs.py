"""Ray: Ray Train's JaxTrainer starts the processes, one a worker. Here, or on a cluster by `ray job submit`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from typing import Any

from pippin.core.errors import ConfigError
from pippin.train.cluster.backend import ClusterError, JobStatus, Phase, call
from pippin.train.cluster.exit_codes import Outcome, outcome_of
from pippin.train.cluster.launch_spec import LaunchSpec

DRIVER = "pippin.train.cluster.ray_driver"

# Kind of accelerator -> Ray's name of it.
_RAY_TPUS = {"tpu-v5e": "TPU-V5LITEPOD", "tpu-v5p": "TPU-V5P", "tpu-v6e": "TPU-V6E"}
_PHASES = {
    "PENDING": (Phase.PENDING, None),
    "RUNNING": (Phase.RUNNING, None),
    "SUCCEEDED": (Phase.ENDED, Outcome.DONE),
    "STOPPED": (Phase.ENDED, Outcome.PREEMPTED),
}
_EXIT_CODE = re.compile(r"exit code (\d+)")
_INSTALL = "Install it: pip install 'pippin-train[ray]', or run bazel run //packages/train:launch_ray."
_ADDRESS = "Give --address http://HOST:8265, that of the cluster's dashboard."


@dataclasses.dataclass(frozen=True)
class RayJob:
    """What the driver needs to know: JSON, on its command line."""

    name: str
    arguments: list[str]
    out: str
    env: dict[str, str]
    max_restarts: int
    scaling: dict[str, Any]  # the fields of Ray Train's ScalingConfig


class RayBackend:
    """Ray on this machine or, where an address is given, on a cluster."""

    def __init__(self, address: str | None = None):
        self._address = address

    def render(self, spec: LaunchSpec) -> str:
        """The driver's JSON."""
        return json.dumps(dataclasses.asdict(ray_job(spec)), indent=2) + "\n"

    def submit(self, spec: LaunchSpec) -> JobStatus:
        """Trains here, to the end; on a cluster, submits and returns."""
        job = ray_job(spec)
        text = json.dumps(dataclasses.asdict(job))
        if self._address is None:
            _require_ray()
            done = subprocess.run([sys.executable, "-P", "-m", DRIVER, text], check=False)
            return JobStatus(Phase.ENDED, "Ray on this machine", outcome_of(done.returncode))
        options = ["--submission-id", spec.name, "--no-wait", "--", "python", "-m", DRIVER, shlex.quote(text)]
        _ray_job("submit", "--address", self._address, *options)
        return JobStatus(Phase.PENDING, f"submitted to {self._address}")

    def status(self, name: str) -> JobStatus:
        """In Ray's words."""
        said = self._job("status", name)
        state = next((word for word in re.findall(r"[A-Z]{6,}", said) if word in (*_PHASES, "FAILED")), "")
        if state == "FAILED":
            code = _EXIT_CODE.search(said)
            outcome = {o.exit_code: o for o in Outcome}.get(int(code[1]) if code else -1, Outcome.RETRYABLE)
            return JobStatus(Phase.ENDED, "FAILED", outcome)
        phase, outcome = _PHASES.get(state, (Phase.PENDING, None))
        return JobStatus(phase, state or said.strip(), outcome)

    def logs(self, name: str, process: int) -> str:
        """Of all processes: each line says whose it is."""
        return self._job("logs", name)

    def cancel(self, name: str) -> str:
        """Stops the driver, and with it the workers."""
        return self._job("stop", name).strip()

    def _job(self, action: str, name: str) -> str:
        if self._address is None:
            raise ConfigError(
                f"jobs {action} got no --address, and a job of Ray on this machine ends with launch. {_ADDRESS}"
            )
        return _ray_job(action, "--address", self._address, name)


def _ray_job(*arguments: str) -> str:
    """What Ray's own client of jobs prints: its program, of this interpreter."""
    _require_ray()
    return call([sys.executable, "-m", "ray.scripts.scripts", "job", *arguments], _INSTALL)


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(f"Ray is not installed, and the ray backend runs on it. {_INSTALL}")


def ray_job(spec: LaunchSpec) -> RayJob:
    """The job that a spec describes.

    Raises:
        ConfigError: it asks for what Ray does not know.
    """
    if spec.image:
        raise ConfigError(
            f"the ray backend got the image {spec.image!r}; its workers run in the cluster's. Leave out --image."
        )
    scaling: dict[str, Any] = {"num_workers": spec.num_hosts}
    if spec.platform == "tpu":
        assert spec.target is not None
        kind = spec.target.device.kind
        if kind not in _RAY_TPUS:
            raise ConfigError(
                f"the ray backend has no name for {kind}. It knows {', '.join(_RAY_TPUS)}. Use another backend."
            )
        scaling |= {"use_tpu": True, "accelerator_type": _RAY_TPUS[kind], "topology": spec.topology}
        scaling["resources_per_worker"] = {"TPU": spec.devices_per_host}
    elif spec.platform == "gpu":
        scaling |= {"use_gpu": True, "resources_per_worker": {"GPU": spec.devices_per_host}}
    return RayJob(
        name=spec.name,
        arguments=list(spec.arguments),
        out=spec.out,
        env=dict(spec.env),
        max_restarts=spec.max_restarts,
        scaling=scaling,
    )
