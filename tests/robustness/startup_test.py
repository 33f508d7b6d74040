"""What a user does wrong at the start, and where nothing can be written: a line that says so, and never a stack trace."""

import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest

from pippin.v1 import inference_pb2 as pb
from tests.robustness.process import generate, method_of, running, wait_for

FAKE = {"module": "pippin.serve.fake_server", "before": ("0",)}


def started(*flags: str) -> tuple[int, str]:
    """How the program ends with flags that are wrong, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "pippin.serve.fake_server", "0", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stdout
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0", "--admin-address", "unix:"], "names no file"),
        (["--port", "0", "--admin-address", "unix:/no/such/folder/admin"], "Its folder must exist"),
        (["--port", "0", "--probe-address", "127.0.0.1"], "no address of this machine"),
        (["--port", "0", "--tls-cert", "/dev/null", "--tls-key", "/dev/null"], "not a file"),
        (["--port", "0", "--tls-cert", sys.executable, "--tls-key", sys.executable], "not a certificate"),
        (["--port", "0", "--tokens", "/"], "Is a directory"),
        (["--port", "0", "--tokens", sys.executable], "not UTF-8"),
        (["--port", "0", "--stall", "nan"], "must be from 0"),
        (["--port", "0", "--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_is_told_in_a_line(flags, message):
    code, errors = started(*flags)
    assert code == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors


@pytest.mark.parametrize("second", ["--http-port", "--metrics-port"])
def test_one_port_for_two_servers_is_refused_and_leaves_nothing(second):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code, errors = started("--port", port, second, port)
    assert code == 2 and "could not be opened" in errors and "Traceback" not in errors
    assert "never awaited" not in errors


@pytest.mark.parametrize("out", ["stdout", "stderr"])
def test_a_full_disk_for_what_it_prints_and_logs_stops_nothing(out, tmp_path):
    """Of the log of requests, too: it goes the same way."""
    address = f"unix:{tmp_path}/admin" if len(str(tmp_path)) < 80 else "127.0.0.1:0"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full, open(tmp_path / "other", "w") as other:
        process = subprocess.Popen(
            [sys.executable, "-m", "pippin.serve.fake_server", "0", "--port", str(port), "--withdraw", "0"]
            + ["--log-format", "json", "--admin-address", address],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            **{"stdout": other, "stderr": other, out: full},
        )
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                model = method_of("GetModel", channel)
                assert model(pb.GetModelRequest(), timeout=30, wait_for_ready=True).name == "letters"
                for _ in range(200):
                    assert generate(channel, max_tokens=2)[-1].HasField("finished")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
    told = (tmp_path / "other").read_text()
    assert "Traceback" not in told
    assert told.count('"finish_reason": ') == (0 if out == "stderr" else 200)


def test_a_port_that_is_taken_is_left_to_who_has_it():
    with running(**FAKE) as server:
        code, errors = started("--port", server.address.rpartition(":")[2])
        assert code == 2 and "another process has it" in errors
        code, errors = started("--port", "0", "--admin-address", server.admin_address)
        assert code == 2 and "served by another process" in errors
        with grpc.insecure_channel(server.address) as channel:
            assert generate(channel, max_tokens=2)[-1].HasField("finished")
        wait_for(server.is_idle, "nothing to do")
