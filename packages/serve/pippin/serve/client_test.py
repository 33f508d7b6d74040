import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import grpc
import pytest

from pippin.serve import client as client_module
from pippin.serve.client import Client, parse_arguments, printable, request_of, run
from pippin.serve.engine.testing import answer
from pippin.serve.testing import serving_in_thread
from pippin.v1 import inference_pb2 as pb


def expected(text: str, count: int, seed: int = 1) -> str:
    return bytes(answer(text.encode(), count, seed)).decode()


def test_a_prompt_is_continued_on_standard_output(capsys):
    with serving_in_thread() as address:
        code = run(["hello", "--complete", "--address", address, "--max-tokens", "12", "--seed", "1"])
    assert (code, capsys.readouterr().out) == (0, expected("hello", 12) + "\n")


def test_a_model_that_takes_questions_is_asked(capsys):
    with serving_in_thread() as address:
        flags = ["--system", "s", "--address", address, "--max-tokens", "12", "--seed", "1"]
        assert run(["hello", *flags]) == 0
    assert capsys.readouterr().out == expected("system:s\nuser:hello\n", 12) + "\n"


def test_what_is_not_given_is_not_sent():
    request = request_of(parse_arguments(["hello", "--temperature", "0"]))
    assert {f.name for f, _ in request.ListFields()} == {"request_id", "temperature"}


def test_a_conversation_remembers_what_was_said(capsys, monkeypatch):
    typed = iter(["hi", "", "more"])

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    with serving_in_thread() as address:
        code = run(["--chat", "--system", "s", "--address", address, "--max-tokens", "5", "--seed", "1"])
    first = expected("system:s\nuser:hi\n", 5)
    second = expected(f"system:s\nuser:hi\nassistant:{first}\nuser:more\n", 5)
    assert (code, capsys.readouterr().out) == (0, f"{first}\n{second}\n\n")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["hello", "--max-tokens", "-1"], 2, "INVALID_ARGUMENT: max_tokens"),
        (["hello", "--timeout", "0.2", "--max-tokens", "400"], 124, "DEADLINE_EXCEEDED"),
        (["hello", "--ca", "/no/such/file"], 2, "cannot be read"),
    ],
)
def test_what_went_wrong_is_a_line_and_an_exit_code(argv, code, message, capsys):
    with serving_in_thread(step_s=0.01) as address:
        assert run([*argv, "--address", address]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("client: ") and message in line


def test_without_a_server_it_says_so(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert run(["hello", "--address", address, "--timeout", "1"]) == 69
    assert f"no server answers at {address}" in capsys.readouterr().err


def test_a_token_is_sent(tmp_path, capsys, monkeypatch):
    (tmp_path / "tokens").write_text("a" * 32 + " inference ann\n")
    (tmp_path / "mine").write_text("a" * 32 + "\n")
    with serving_in_thread(tokens=tmp_path / "tokens") as address:
        argv = ["hello", "--address", address, "--max-tokens", "1"]
        assert run(argv) == 2 and "UNAUTHENTICATED" in capsys.readouterr().err
        assert run([*argv, "--token-file", str(tmp_path / "mine")]) == 0
        monkeypatch.setenv("PIPPIN_TOKEN", "a" * 32)
        assert run(argv) == 0


class Failing(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "gone"

    def trailing_metadata(self):
        return ()


class Call(list):
    """Events, then an error."""

    def __iter__(self):
        for event in super().__iter__():
            if isinstance(event, Exception):
                raise event
            yield event


def client_of(monkeypatch, *calls):
    """A client whose calls go so, the requests that it sends, and how long it waits between them."""
    sent, waits, left = [], [], list(calls)

    def method(request, timeout, metadata):
        sent.append(request.request_id)
        return Call(left.pop(0))

    monkeypatch.setattr(client_module, "client_method", lambda *_: method)
    return Client(None, 60.0, sleep=waits.append), sent, waits  # pyright: ignore[reportArgumentType]


UNAVAILABLE = Failing(grpc.StatusCode.UNAVAILABLE)
TOKEN = pb.GenerateResponse(delta=pb.Delta(text="x"))
STARTED = pb.GenerateResponse(started=pb.Started())


def test_where_no_server_was_there_it_is_tried_again_with_the_same_id(monkeypatch):
    client, sent, waits = client_of(monkeypatch, [UNAVAILABLE], [STARTED, UNAVAILABLE], [STARTED, TOKEN])
    assert client.generate(pb.GenerateRequest(request_id="r"), lambda _: None) == "x"
    assert (sent, waits) == (["r"] * 3, [0.5, 1.0])


@pytest.mark.parametrize(
    "call", [[TOKEN, UNAVAILABLE], [Failing(grpc.StatusCode.INTERNAL)], [Failing(grpc.StatusCode.CANCELLED)]]
)
def test_after_the_first_token_or_another_error_it_is_not(monkeypatch, call):
    client, sent, _ = client_of(monkeypatch, call)
    with pytest.raises(grpc.RpcError):
        client.generate(pb.GenerateRequest(request_id="r"), lambda _: None)
    assert sent == ["r"]


def test_a_model_cannot_steer_the_terminal():
    assert printable("a\x1b[2J\x07b\n\tö\u202e") == "a\ufffd[2J\ufffdb\n\tö\ufffd"


@contextlib.contextmanager
def process(*argv):
    """The client as a process, which ends after a while whatever happens."""
    command = [sys.executable, "-m", "pippin.serve.client", *argv]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    ) as started:
        timer = threading.Timer(30, started.kill)
        timer.start()
        try:
            yield started
        finally:
            timer.cancel()
            started.kill()


def read_until(process, text):
    found = ""
    while text not in found:
        got = process.stdout.read(1000)
        assert got, found
        found += got.decode()


def test_ctrl_c_ends_an_answer_and_not_the_conversation():
    with serving_in_thread(step_s=0.01) as address:
        argv = ["--chat", "--address", address, "--seed", "1", "--max-tokens", "400"]
        with process(*argv) as started:
            read_until(started, "> ")
            started.stdin.write(b"hi\n")
            read_until(started, expected("user:hi\n", 3))
            started.send_signal(signal.SIGINT)
            read_until(started, "> ")
            started.stdin.close()
            assert started.wait(10) == 0


def test_ctrl_c_of_one_request_ends_the_program():
    with serving_in_thread(step_s=0.01) as address, process("hello", "--address", address) as started:
        assert started.stdout.read(1)
        started.send_signal(signal.SIGINT)
        assert started.wait(10) == 130
