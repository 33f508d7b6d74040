"""Kubernetes takes what is rendered, and its times are in the right order."""

import copy

import kubernetes_validate
import pytest
import yaml

from pippin.core.errors import ConfigError
from pippin.serve.manifests import Deployment, main, manifests, parse
from pippin.serve.options import parse_options

_KUBERNETES = kubernetes_validate.latest_version()
SPEC = Deployment(
    name="chat",
    image="example/pippin:1",
    model="/models/chat",
    resources={"cpu": "8", "memory": "16Gi"},
    claims={"models": "/models"},
    picker="chat-epp",
)


def of_kind(kind, spec=SPEC):
    (found,) = [m for m in manifests(spec) if m["kind"] == kind]
    return found


def pod_of(spec=SPEC):
    return of_kind("Deployment", spec)["spec"]["template"]["spec"]


def require_valid(manifest):
    kubernetes_validate.validate(manifest, _KUBERNETES, strict=True)


@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget"])
def test_objects_are_of_kubernetes_schemas(kind):
    require_valid(of_kind(kind))


def test_the_schemas_would_find_a_mistake():
    wrong = copy.deepcopy(of_kind("Deployment"))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["prot"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        require_valid(wrong)


def test_the_server_takes_its_flags_and_they_agree_with_the_pod():
    (container,) = pod_of()["containers"]
    program, *arguments = container["command"]
    options = parse_options(arguments)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert program == "pippin-serve" and options.model == "/models/chat"
    assert (options.port, options.http_port, options.metrics_port) == (
        ports["grpc"],
        ports["http"],
        ports["metrics"],
    )
    assert options.probe_address == f"0.0.0.0:{ports['probe']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["probe"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(any(str(f).startswith(m) for m in mounts) for f in (options.tls_cert, options.tokens))


@pytest.mark.parametrize("grace_s", [0.0, 60.0, 600.5])
def test_a_pod_gets_longer_to_stop_than_the_server_takes(grace_s):
    spec = parse(["--name", "a", "--image", "i", "--model", "m", "--grace", str(grace_s)])
    pod = pod_of(spec)
    sleep_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    options = parse_options(pod["containers"][0]["command"][1:])
    assert options.grace_s == grace_s
    assert pod["terminationGracePeriodSeconds"] >= sleep_s + options.withdraw_s + options.grace_s + 10


def test_clients_and_the_gateway_find_the_pods():
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    service, pool = of_kind("Service")["spec"], of_kind("InferencePool")["spec"]
    assert service["clusterIP"] == "None" and service["selector"] == labels
    assert pool["selector"]["matchLabels"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert pool["targetPorts"][0]["number"] in [port["port"] for port in service["ports"]]
    assert pool["endpointPickerRef"]["name"] == "chat-epp"


def test_the_program_prints_yaml(capsys):
    flags = ["--name", "chat", "--image", "i", "--model", "m", "--resource", "cpu=2", "--volume", "models=/m"]
    assert main([*flags, "--", "--max-requests", "8"]) == 0
    deployment, _, budget = yaml.safe_load_all(capsys.readouterr().out)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"][-2:] == ["--max-requests", "8"]
    assert container["resources"]["limits"] == {"cpu": "2"}
    assert budget["kind"] == "PodDisruptionBudget"


@pytest.mark.parametrize(("fields", "message"), [({"name": "A_b"}, "a-z"), ({"replicas": 0}, "1 or more")])
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        manifests(Deployment(**{"name": "a", "image": "i", "model": "m", **fields}))
