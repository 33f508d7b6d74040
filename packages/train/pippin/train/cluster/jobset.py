"""Kubernetes: a JobSet of indexed Jobs, one pod a host, on a node pool of TPUs, GPUs or CPUs. kubectl submits it.

The Jobs tell the ends of a pod apart by its exit code. One that was asked to stop and saved (75) is started again, and
not counted. A mistake of the user's or the program's fails the JobSet. Anything else restarts all pods, within the budget.

Sources: JobSet's API, jobset.x-k8s.io/v1alpha2; Kubernetes' batch/v1 (pod failure policy); Google's pages on TPUs and
GPUs in GKE for the labels of its nodes.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from pippin.core.errors import ConfigError
from pippin.train.cluster.backend import JobStatus, Phase, call
from pippin.train.cluster.exit_codes import ERROR, FATAL, PREEMPTED, Outcome
from pippin.train.cluster.launch_spec import MODULE, LaunchSpec

_GROUP = "workers"  # the one replicated Job
_PORT = 8476
_REMEDY = "Install it, and log in to the cluster; or look at what would be submitted with --dry-run."

# Kind of accelerator -> the label of GKE's nodes that have it.
_GKE_TPUS = {
    "tpu-v5e": "tpu-v5-lite-podslice",
    "tpu-v5p": "tpu-v5p-slice",
    "tpu-v6e": "tpu-v6e-slice",
}
_GKE_GPUS = {
    "gpu-h100": "nvidia-h100-80gb",
    "gpu-h200": "nvidia-h200-141gb",
    "gpu-b200": "nvidia-b200",
}

# Numbers the processes over all slices, and becomes the program, so that signals reach it.
_START = 'export PIPPIN_PROCESS_ID=$((JOB_INDEX * PODS_PER_JOB + JOB_COMPLETION_INDEX)); exec "$@"'


class JobSetBackend:
    """Kubernetes with the JobSet controller, and Kueue where a queue is named."""

    def __init__(self, namespace: str = "default"):
        self._kubectl = ["kubectl", "--namespace", namespace]

    def render(self, spec: LaunchSpec) -> str:
        """The manifest, as YAML."""
        return yaml.safe_dump(manifest(spec), sort_keys=False)

    def submit(self, spec: LaunchSpec) -> JobStatus:
        """Creates the JobSet; one of the same name must not be there."""
        said = call([*self._kubectl, "create", "-f", "-"], _REMEDY, stdin=self.render(spec))
        return JobStatus(Phase.PENDING, said.strip())

    def status(self, name: str) -> JobStatus:
        """By the JobSet's terminal state and conditions."""
        found = json.loads(call([*self._kubectl, "get", "jobset", name, "-o", "json"], _REMEDY))
        return read_status(found.get("status", {}), suspended=found["spec"].get("suspend", False))

    def logs(self, name: str, process: int) -> str:
        """Of one process of the first slice."""
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/job-index": "0",
            "batch.kubernetes.io/job-completion-index": str(process),
        }
        selector = ",".join(f"{k}={v}" for k, v in labels.items())
        return call([*self._kubectl, "logs", "--tail=-1", "-l", selector], _REMEDY)

    def cancel(self, name: str) -> str:
        """Deletes the JobSet. Its pods get the signal that asks to stop, and time to save."""
        return call([*self._kubectl, "delete", "jobset", name, "--wait=false"], _REMEDY).strip()


def manifest(spec: LaunchSpec) -> dict[str, Any]:
    """The JobSet of a job.

    Raises:
        ConfigError: it names no image, or there is no pool of its accelerators.
    """
    if not spec.image:
        raise ConfigError(
            "the jobset backend got no image: its pods run pippin from one. Build an image with pippin-train installed, "
            "push it, and give --image."
        )
    pods = spec.num_hosts // spec.num_slices
    labels = {"kueue.x-k8s.io/queue-name": spec.queue} if spec.queue else {}
    # A slice is a node pool: no two Jobs share one.
    pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one lost pod leaves the others in a step that never ends
        "podFailurePolicy": {
            "rules": [
                _on_exit("Ignore", PREEMPTED),
                _on_exit("FailJob", FATAL, ERROR),
            ]
        },
        "template": {"spec": _pod(spec, pods)},
    }
    if spec.time_limit_s is not None:
        job["activeDeadlineSeconds"] = spec.time_limit_s
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": spec.name,
            "namespace": spec.namespace,
            "labels": labels,
            "annotations": pool if spec.platform == "tpu" and not spec.node_selector else {},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": spec.max_restarts,
                "rules": [
                    {
                        "name": "notToBeTriedAgain",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                    }
                ],
            },
            "replicatedJobs": [{"name": _GROUP, "replicas": spec.num_slices, "template": {"spec": job}}],
        },
    }


def read_status(status: dict[str, Any], suspended: bool) -> JobStatus:
    """What a JobSet's status means."""
    state = status.get("terminalState")
    restarts = f"{status.get('restarts', 0)} restarts"
    if state == "Completed":
        return JobStatus(Phase.ENDED, f"Completed, {restarts}", Outcome.DONE)
    if state:
        failed = next((c for c in status.get("conditions", []) if c["type"] == "Failed"), {})
        reason = failed.get("reason", "")
        outcome = Outcome.RETRYABLE if reason == "ReachedMaxRestarts" else Outcome.ERROR
        return JobStatus(Phase.ENDED, f"{state}: {reason}, {restarts}", outcome)
    jobs = status.get("replicatedJobsStatus", [])
    if suspended or not any(job.get("active") for job in jobs):
        return JobStatus(Phase.PENDING, "waiting for its queue" if suspended else "no pod yet")
    ready = sum(job.get("ready", 0) for job in jobs)
    return JobStatus(Phase.RUNNING, f"{ready} Jobs ready, {restarts}")


def _pod(spec: LaunchSpec, pods: int) -> dict[str, Any]:
    """The pod of a host."""
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}.get(spec.platform)
    container: dict[str, Any] = {
        "name": "train",
        "image": spec.image,
        "command": ["sh", "-c", _START, "start", "python3", "-m", MODULE, *spec.arguments],
        "env": _env(spec, pods),
    }
    if resource:
        amount = str(spec.devices_per_host)
        container["resources"] = {"requests": {resource: amount}, "limits": {resource: amount}}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the Job starts new pods, by its policy
        "terminationGracePeriodSeconds": spec.stop_grace_s,
        "nodeSelector": _node_selector(spec),
        "containers": [container],
    }
    if spec.platform == "gpu":
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if spec.volumes:
        names = {claim: f"volume-{i}" for i, claim in enumerate(spec.volumes)}
        pod["volumes"] = [
            {"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()
        ]
        container["volumeMounts"] = [
            {"name": names[claim], "mountPath": path} for claim, path in spec.volumes.items()
        ]
    return pod


def _env(spec: LaunchSpec, pods: int) -> list[dict[str, Any]]:
    index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
    first = f"{spec.name}-{_GROUP}-0-0.{spec.name}"  # by the JobSet's headless service
    own = {
        "PIPPIN_COORDINATOR": f"{first}:{_PORT}",
        "PIPPIN_NUM_PROCESSES": str(spec.num_hosts),
        "PODS_PER_JOB": str(pods),
        **spec.env,
    }
    return [
        {"name": "JOB_INDEX", "valueFrom": index},
        *({"name": name, "value": value} for name, value in own.items()),
    ]


def _node_selector(spec: LaunchSpec) -> dict[str, str]:
    if spec.node_selector or spec.target is None or spec.platform == "cpu":
        return dict(spec.node_selector)
    kind = spec.target.device.kind
    label = (_GKE_TPUS | _GKE_GPUS).get(kind)
    if label is None:
        raise ConfigError(
            f"the jobset backend knows no node pool of {kind}. It knows those of {', '.join(_GKE_TPUS | _GKE_GPUS)}; for "
            "others give the labels of the nodes, with --node-selector LABEL=VALUE."
        )
    if kind in _GKE_GPUS:
        return {"cloud.google.com/gke-accelerator": label}
    return {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": spec.topology,
    }


def _on_exit(action: str, *codes: int) -> dict[str, Any]:
    return {
        "action": action,
        "onExitCodes": {"containerName": "train", "operator": "In", "values": list(codes)},
    }
