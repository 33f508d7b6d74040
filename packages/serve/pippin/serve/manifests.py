"""The server on Kubernetes, as YAML: `manifests --name NAME --image IMAGE --model PATH | kubectl apply -f -`.

A Deployment whose pods are told to stop after traffic has gone elsewhere, and get longer to stop than the server takes; a
headless Service, so that gRPC clients see each pod and balance over them; a budget of disruptions; and, where an endpoint
picker is named, the InferencePool of the gateway's inference extension.

Sources: Kubernetes' apps/v1, v1 (gRPC probes, the sleep of preStop) and policy/v1; the Gateway API Inference Extension's
inference.networking.k8s.io/v1.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pippin.core.errors import ConfigError

_GRPC, _PROBE, _HTTP, _METRICS = 50051, 50052, 8000, 9090
_PICKER_PORT = 9002
_TLS, _CALLERS = "/etc/pippin/tls", "/etc/pippin/callers"
_PRE_STOP_S = 5  # until all that route have heard that the pod goes
_STOP_MARGIN_S = 15  # for last words, and the end of a process that holds much memory
_PROBE_S = 5
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is run, and how often."""

    name: str
    image: str  # with pippin-serve installed
    model: str  # as its --model, in the pod
    namespace: str = "default"
    replicas: int = 2
    resources: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of each pod
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    claims: Mapping[str, str] = dataclasses.field(default_factory=dict)  # volume claim -> where it is read
    picker: str | None = None  # the endpoint picker's Service
    withdraw_s: float = 2.0
    grace_s: float = 60.0
    startup_s: float = 600.0  # to read the model and compile its programs
    flags: Sequence[str] = ()  # more, for the server

    @property
    def stop_s(self) -> int:
        """What Kubernetes gives a pod to end: more than the server takes."""
        return math.ceil(_PRE_STOP_S + self.withdraw_s + self.grace_s + _STOP_MARGIN_S)


def manifests(spec: Deployment) -> list[dict[str, Any]]:
    """The objects.

    Raises:
        ConfigError: the name is none of Kubernetes', or there is no replica.
    """
    if not _NAME.fullmatch(spec.name):
        raise ConfigError(f"--name {spec.name!r} must be 1 to 52 of a-z, 0-9 and -, and begin with a letter.")
    if spec.replicas < 1:
        raise ConfigError(f"--replicas {spec.replicas} must be 1 or more.")
    found = [_deployment(spec), _service(spec), _budget(spec)]
    return found if spec.picker is None else [*found, _pool(spec, spec.picker)]


def _deployment(spec: Deployment) -> dict[str, Any]:
    labels = _labels(spec)
    # One that is new serves before an old one goes.
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return {
        **_head(spec, "apps/v1", "Deployment"),
        "spec": {
            "replicas": spec.replicas,
            "selector": {"matchLabels": labels},
            "strategy": strategy,
            "template": {"metadata": {"labels": labels}, "spec": _pod(spec)},
        },
    }


def _pod(spec: Deployment) -> dict[str, Any]:
    secrets = {"tls": (f"{spec.name}-tls", _TLS), "callers": (f"{spec.name}-callers", _CALLERS)}
    claims = {f"claim-{i}": pair for i, pair in enumerate(spec.claims.items())}
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": spec.stop_s,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(spec, {**secrets, **claims})],
        "volumes": [
            *({"name": name, "secret": {"secretName": secret}} for name, (secret, _) in secrets.items()),
            *(
                {"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
                for name, (claim, _) in claims.items()
            ),
        ],
    }
    return {**pod, "nodeSelector": dict(spec.node_selector)} if spec.node_selector else pod


def _container(spec: Deployment, volumes: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    return {
        "name": "server",
        "image": spec.image,
        "command": ["pippin-serve", *_arguments(spec)],
        "ports": [
            {"name": name, "containerPort": port}
            for name, port in {"grpc": _GRPC, "probe": _PROBE, "http": _HTTP, "metrics": _METRICS}.items()
        ],
        # Nothing else is looked at until it has started.
        "startupProbe": _probe(math.ceil(spec.startup_s / _PROBE_S)),
        "readinessProbe": _probe(1),
        # Health is not serving when no step is computed for a while: such a pod is started anew, after its grace.
        "livenessProbe": _probe(6),
        "lifecycle": {"preStop": {"sleep": {"seconds": _PRE_STOP_S}}},
        "resources": {"requests": dict(spec.resources), "limits": dict(spec.resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": name, "mountPath": path, "readOnly": True} for name, (_, path) in volumes.items()
        ],
    }


def _arguments(spec: Deployment) -> list[str]:
    flags = {
        "--model": spec.model,
        "--host": "0.0.0.0",
        "--port": _GRPC,
        "--http-port": _HTTP,
        "--metrics-port": _METRICS,
        "--probe-address": f"0.0.0.0:{_PROBE}",
        "--tls-cert": f"{_TLS}/tls.crt",
        "--tls-key": f"{_TLS}/tls.key",
        "--tokens": f"{_CALLERS}/callers",
        "--withdraw": f"{spec.withdraw_s:g}",
        "--grace": f"{spec.grace_s:g}",
    }
    return [*(str(part) for flag in flags.items() for part in flag), *spec.flags]


def _probe(failures: int) -> dict[str, Any]:
    return {
        "grpc": {"port": _PROBE},
        "periodSeconds": _PROBE_S,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }


def _service(spec: Deployment) -> dict[str, Any]:
    ports = {"grpc": (_GRPC, "grpc"), "http": (_HTTP, "https")}
    return {
        **_head(spec, "v1", "Service"),
        "spec": {
            "clusterIP": "None",
            "selector": _labels(spec),
            "ports": [
                {"name": name, "port": port, "targetPort": name, "appProtocol": protocol}
                for name, (port, protocol) in ports.items()
            ],
        },
    }


def _budget(spec: Deployment) -> dict[str, Any]:
    return {
        **_head(spec, "policy/v1", "PodDisruptionBudget"),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(spec)}},
    }


def _pool(spec: Deployment, picker: str) -> dict[str, Any]:
    return {
        **_head(spec, "inference.networking.k8s.io/v1", "InferencePool"),
        "spec": {
            "selector": {"matchLabels": _labels(spec)},
            "targetPorts": [{"number": _HTTP}],
            "endpointPickerRef": {"name": picker, "port": {"number": _PICKER_PORT}},
        },
    }


def _head(spec: Deployment, version: str, kind: str) -> dict[str, Any]:
    metadata = {"name": spec.name, "namespace": spec.namespace, "labels": _labels(spec)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _labels(spec: Deployment) -> dict[str, str]:
    return {"app.kubernetes.io/name": "pippin-serve", "app.kubernetes.io/instance": spec.name}


def parse(argv: Sequence[str] | None = None) -> Deployment:
    """What a command line asks for; flags after `--` are the server's."""
    parser = argparse.ArgumentParser(
        prog="manifests",
        description="Prints the server's objects of Kubernetes as YAML. Secrets NAME-tls (tls.crt, tls.key) and "
        "NAME-callers (callers) must be there.",
    )
    add = parser.add_argument
    add("--name", required=True, help="of all objects")
    add("--image", required=True, help="has pippin-serve installed")
    add("--model", required=True, help="what the server's --model is, in the pod")
    add("--namespace", default="default")
    add("--replicas", type=int, default=2)
    add(
        "--resource",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=AMOUNT",
        help="of each pod: cpu=8",
    )
    add("--node-selector", type=_pair, action="append", default=[], metavar="LABEL=VALUE")
    add("--volume", type=_pair, action="append", default=[], metavar="CLAIM=PATH", help="read by the pods")
    add("--endpoint-picker", metavar="SERVICE", help="also an InferencePool, with this picker")
    add(
        "--grace",
        type=float,
        default=60.0,
        metavar="S",
        help="how long requests may go on at a stop (%(default)g s)",
    )
    add("--startup", type=float, default=600.0, metavar="S", help="how long a start may take (%(default)g s)")
    add("flags", nargs="*", help="of the server, after --")
    given = parser.parse_args(argv)
    return Deployment(
        name=given.name,
        image=given.image,
        model=given.model,
        namespace=given.namespace,
        replicas=given.replicas,
        resources=dict(given.resource),
        node_selector=dict(given.node_selector),
        claims=dict(given.volume),
        picker=given.endpoint_picker,
        grace_s=given.grace,
        startup_s=given.startup,
        flags=tuple(given.flags),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifests; the result is the exit code."""
    try:
        print(yaml.safe_dump_all(manifests(parse(argv)), sort_keys=False), end="")
    except ConfigError as error:
        print(f"manifests: {error}", file=sys.stderr)
        return 2
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
