"""The manifest against the models that are generated from JobSet's own schema, and Kubernetes' schema of a Job."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import parse_target
from pippin.train.cluster.backend import ClusterError, Phase
from pippin.train.cluster.exit_codes import Outcome
from pippin.train.cluster.jobset import JobSetBackend, manifest, read_status
from pippin.train.cluster.launch_spec import LaunchSpec

_KUBERNETES = "1.37"


def spec(target: str | None = "tpu-v5p-512", **fields: Any) -> LaunchSpec:
    standard = {
        "name": "llama",
        "arguments": ("--recipe", "llama2_7b"),
        "out": "/runs/llama",
        "image": "pippin:1",
    }
    return LaunchSpec(target=parse_target(target) if target else None, **(standard | fields))


def require_valid(job_set: dict[str, Any]) -> None:
    read = JobsetV1alpha2JobSet.from_dict(job_set)
    assert read is not None
    # Fields that JobSet does not have are dropped when it is read.
    assert read.to_dict() == job_set
    for job in job_set["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job["template"]}
        kubernetes_validate.validate(whole, _KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "target", ["tpu-v5e-8", "tpu-v5p-512", "tpu-v6e-256x2", "gpu-h100-256", "gpu-b200-4", None]
)
def test_the_manifest_is_of_the_engines_schema(target: str | None) -> None:
    fields = {"queue": "q", "time_limit_s": 3600, "env": {"A": "1"}, "volumes": {"runs": "/runs"}}
    require_valid(manifest(spec(target, num_processes=2 if target is None else 1, **fields)))


def test_the_schema_refuses_what_is_wrong() -> None:
    wrong = manifest(spec())
    wrong["spec"]["failurePolicy"]["maxRestarts"] = "three"
    with pytest.raises(ValueError, match="maxRestarts"):
        require_valid(wrong)
    wrong = manifest(spec())
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["exitCodes"] = [1]
    with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
        require_valid(wrong)


def test_a_tpu_slice_gets_its_topology_and_each_host_its_chips() -> None:
    job_set = manifest(spec("tpu-v6e-256x2", queue="research"))
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    workers = job_set["spec"]["replicatedJobs"][0]
    job = workers["template"]["spec"]
    assert (workers["replicas"], job["parallelism"], job["completions"]) == (2, 64, 64)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


def test_gpus_are_asked_for_by_the_host() -> None:
    job = manifest(spec("gpu-h100-16"))["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], pod["containers"][0]["resources"]["limits"]) == (2, {"nvidia.com/gpu": "8"})
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


@pytest.mark.parametrize(("job", "pod", "process"), [("0", "0", "0"), ("0", "63", "63"), ("1", "2", "66")])
def test_the_container_numbers_the_processes_over_all_slices(job: str, pod: str, process: str) -> None:
    container = manifest(spec("tpu-v6e-256x2"))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]["containers"][0]
    env = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    assert env["PIPPIN_COORDINATOR"] == "llama-workers-0-0.llama:8476"
    assert env["PIPPIN_NUM_PROCESSES"] == "128"
    command = [
        *container["command"][:4],
        "sh",
        "-c",
        'echo $PIPPIN_PROCESS_ID "$@"',
        *container["command"][4:],
    ]
    env |= {"JOB_INDEX": job, "JOB_COMPLETION_INDEX": pod, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == process
    assert done.stdout.split()[-2:] == ["--recipe", "llama2_7b"]


def test_ends_are_told_apart_by_exit_code() -> None:
    job_set = manifest(spec(max_restarts=5))["spec"]
    assert job_set["failurePolicy"]["maxRestarts"] == 5
    job = job_set["replicatedJobs"][0]["template"]["spec"]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]}
    assert rules == {"Ignore": [75], "FailJob": [1, 2]}
    assert job["backoffLimit"] == 0
    (rule,) = job_set["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and "PodFailurePolicy" in rule["onJobFailureReasons"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="got no image"):
        manifest(spec(image=""))


@pytest.mark.parametrize(
    ("status", "phase", "outcome"),
    [
        ({}, Phase.PENDING, None),
        ({"replicatedJobsStatus": [{"active": 1, "ready": 1}]}, Phase.RUNNING, None),
        ({"terminalState": "Completed"}, Phase.ENDED, Outcome.DONE),
        (
            {"terminalState": "Failed", "conditions": [{"type": "Failed", "reason": "ReachedMaxRestarts"}]},
            Phase.ENDED,
            Outcome.RETRYABLE,
        ),
        (
            {
                "terminalState": "Failed",
                "conditions": [{"type": "Failed", "reason": "FailJobSetFailurePolicyAction"}],
            },
            Phase.ENDED,
            Outcome.ERROR,
        ),
    ],
)
def test_the_status_says_how_a_job_ended(
    status: dict[str, Any], phase: Phase, outcome: Outcome | None
) -> None:
    found = read_status(status, suspended=False)
    assert (found.phase, found.outcome) == (phase, outcome)


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes its arguments and its input, and answers with a file."""
    tool = tmp_path / "kubectl"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ $3 = create ] && cat > {tmp_path}/input\ncat {tmp_path}/answer\n'
    )
    tool.chmod(0o755)
    (tmp_path / "answer").write_text(json.dumps({"spec": {}, "status": {"terminalState": "Completed"}}))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_the_client_is_called(kubectl: Path) -> None:
    backend = JobSetBackend("team")
    backend.submit(spec())
    assert yaml.safe_load((kubectl / "input").read_text()) == manifest(spec())
    assert backend.status("llama").outcome is Outcome.DONE
    backend.logs("llama", 3)
    backend.cancel("llama")
    labels = "jobset.sigs.k8s.io/jobset-name=llama,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=3"
    assert (kubectl / "calls").read_text().splitlines() == [
        "--namespace team create -f -",
        "--namespace team get jobset llama -o json",
        f"--namespace team logs --tail=-1 -l {labels}",
        "--namespace team delete jobset llama --wait=false",
    ]


def test_a_client_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="kubectl is not on PATH"):
        JobSetBackend().status("llama")


def test_what_the_client_refuses_is_told(kubectl: Path) -> None:
    (kubectl / "kubectl").write_text("#!/bin/sh\necho 'jobsets \"llama\" not found' >&2\nexit 1\n")
    with pytest.raises(ClusterError, match='failed with exit code 1: jobsets "llama" not found'):
        JobSetBackend().status("llama")
