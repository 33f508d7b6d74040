"""The program: from READY to its exit code."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2

from pippin.core.errors import ConfigError
from pippin.serve.addresses import require_free
from pippin.serve.busy_threads import NAME
from pippin.serve.options import Options
from pippin.serve.server import open_backend, run, start
from pippin.serve.testing import fake_backend
from pippin.v1 import inference_pb2 as pb


@contextlib.contextmanager
def program(*flags, step_s=0.0, code=("-m", "pippin.serve.fake_server")):
    """A server as a process of its own, and its READY line."""
    process = subprocess.Popen(
        [sys.executable, *code, str(step_s), "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()
    finally:
        process.kill()
        process.communicate()


# The fake server, where a model is read for 60 s, and so is a text that begins with "slow".
_SLOW = """
import dataclasses, sys, time
from pippin.serve.fake_server import open_backend
from pippin.serve.server import run

def slow(options):
    backend = open_backend(options)
    encode = backend.model.encode
    return dataclasses.replace(backend, model=dataclasses.replace(
        backend.model,
        encode=lambda text: (time.sleep(60 if text.startswith("slow") else 0), encode(text))[1],
        read_anew=lambda: (time.sleep(60), lambda: None)[1],
    ))

sys.exit(run(slow, sys.argv[2:]))
"""


def generate(channel, **fields):
    method = channel.unary_stream(
        "/pippin.v1.Inference/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    return method(pb.GenerateRequest(text="hello", **fields), timeout=30)


def is_serving(channel) -> bool:
    method = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return method(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_ready_says_where_what_and_how_long_it_took():
    with program() as (_, ready):
        word, address, model, seconds, unit = ready
        assert (word, model, unit) == ("READY", "letters", "s") and float(seconds) < 60
        with grpc.insecure_channel(address) as channel:
            assert [e.WhichOneof("event") for e in generate(channel, max_tokens=1)][-1] == "finished"


def test_http_is_told_and_its_streams_are_not_cut_by_sigterm():
    flags = ["--http-port", "0", "--withdraw", "0", "--grace", "20"]
    with program(*flags, step_s=0.02) as (process, _):
        word, url = process.stdout.readline().split()
        request = {"prompt": "hello", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url}v1/completions", json=request) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            *told, end = [first, *(line for line in lines if line)]
        texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in told]
        assert word == "HTTP" and len("".join(texts)) == 60 and end == "data: [DONE]"
        assert process.wait(10) == 0


def test_the_first_sigterm_withdraws_then_refuses_then_finishes_and_exits_with_0():
    with program("--withdraw", "1", "--grace", "20", step_s=0.02) as (process, ready):
        with grpc.insecure_channel(ready[1]) as channel:
            taken = generate(channel, max_tokens=150)
            assert next(taken).HasField("started")
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not is_serving(channel))
            late = list(generate(channel, max_tokens=3))  # while clients still come
            assert late[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH
            time.sleep(1)
            with pytest.raises(grpc.RpcError) as refused:
                list(generate(channel, max_tokens=3))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            rest = list(taken)
        assert rest[-1].finished.usage.output_tokens == 150, "no stream is cut"
        assert process.wait(10) == 0


def test_what_is_not_done_within_the_grace_ends_as_unavailable():
    with program("--withdraw", "0", "--grace", "0.5", step_s=0.05) as (process, ready):
        with grpc.insecure_channel(ready[1]) as channel:
            call = generate(channel, max_tokens=400)
            next(call)
            process.send_signal(signal.SIGTERM)
            events = []
            with pytest.raises(grpc.RpcError) as error:
                for event in call:
                    events.append(event)  # noqa: PERF402 - the loop ends with an error
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_SHUTDOWN
        assert process.wait(10) == 0


def test_a_watcher_of_health_does_not_hold_the_exit():
    with program("--withdraw", "0") as (process, ready), grpc.insecure_channel(ready[1]) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert [r.status for r in watch] in ([], [health_pb2.HealthCheckResponse.NOT_SERVING])
        assert process.wait(4) == 0


@pytest.mark.parametrize("what", ["text", "model"])
def test_what_is_being_read_does_not_hold_the_exit(what):
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        program(
            *("--withdraw", "0", "--grace", "0.5", "--admin-address", f"unix:{folder}/admin"),
            code=("-c", _SLOW),
        ) as (process, ready),
        grpc.insecure_channel(ready[1]) as channel,
        grpc.insecure_channel(f"unix:{folder}/admin") as admin,
    ):
        if what == "text":
            count = channel.unary_unary("/pippin.v1.Inference/CountTokens")
            with pytest.raises(grpc.RpcError):
                count(pb.CountTokensRequest(text="slow").SerializeToString(), timeout=0.5)
        else:
            call = admin.unary_unary("/pippin.v1.Admin/Reload").future(b"", timeout=50)
            time.sleep(0.5)
            assert not call.done()
        # Another call is answered meanwhile, to its end.
        taken = generate(channel, max_tokens=3)
        assert list(taken)[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


def test_the_second_sigterm_ends_it_at_once():
    with program("--withdraw", "30", step_s=0.05) as (process, _):
        process.send_signal(signal.SIGTERM)
        timer = threading.Timer(0.5, process.send_signal, [signal.SIGTERM])
        timer.start()
        assert process.wait(5) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "nobody is asked"),
        (["--tokens", "/no/such/file"], "cannot be read"),
        (["--tls-cert", "/no/cert", "--tls-key", "/no/key"], "not a file"),
        (["--port", "99999"], "no port"),
    ],
)
def test_a_users_mistake_is_one_line(flags, message):
    with program(*flags) as (process, ready):
        _, errors = process.communicate(timeout=20)
        lines = errors.strip().splitlines()
        assert not ready and process.returncode == 2
        assert message in lines[-1] and "Traceback" not in errors


@pytest.mark.parametrize("flags", [["--tokens", "/no/such/file"], ["--host", "0.0.0.0"], ["--tls-cert", "x"]])
def test_a_users_mistake_is_told_before_the_model_is_read(flags, capsys):
    def read_model(_):
        raise AssertionError

    assert run(read_model, flags) == 2
    assert capsys.readouterr().err.startswith("server: ")


def test_what_is_no_model_is_a_mistake_of_the_user(tmp_path, capsys):
    assert run(open_backend, ["--port", "0", "--model", str(tmp_path / "none")]) == 2
    assert "Give the path of a model" in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["admin", "metrics"])
async def test_a_start_that_fails_half_way_leaves_nothing_open(fails):
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        socket.create_server(("127.0.0.1", 0)) as taken,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        port = free.getsockname()[1]
        free.close()
        metrics_port = taken.getsockname()[1] if fails == "metrics" else None
        name = "admin" if fails == "metrics" else "a" * 200  # too long
        options = Options(
            port=port, admin_address=f"unix:{folder}/{name}", http_port=0, metrics_port=metrics_port
        )
        with pytest.raises(ConfigError, match="could not be opened"):
            await start(options, fake_backend().backend)
        require_free(f"127.0.0.1:{port}")
        if fails == "metrics":
            with socket.socket(socket.AF_UNIX) as probe:
                assert probe.connect_ex(f"{folder}/admin") != 0
    assert not [t for t in threading.enumerate() if t.name == "engine" or t.name.startswith(NAME)]


def test_a_port_that_is_taken_is_a_mistake_of_the_user():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with program("--port", str(port)) as (process, _):
            _, errors = process.communicate(timeout=20)
    expected = (
        f"server: 127.0.0.1:{port} cannot be listened on: another process has it. Choose another address."
    )
    assert (process.returncode, errors.strip()) == (2, expected)
