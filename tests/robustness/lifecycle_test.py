"""Servers that stop, are killed, or are replaced, and clients that do not notice: by the service config of docs/serve.md."""

import concurrent.futures
import contextlib
import itertools
import json
import pathlib
import re
import signal
import socket
import threading
import time

import grpc
import pytest

from pippin.serve.engine.testing import answer
from pippin.v1 import inference_pb2 as pb
from tests.robustness.process import ServerProcess, generate, method_of, running, wait_for
from tests.robustness.scale import scaled

_DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "serve.md"
_QUICK = ("--withdraw", "0.5", "--grace", "20")


def service_config() -> str:
    """The one that the document tells clients to use."""
    blocks = re.findall(r"```json\n(.*?)```", _DOCUMENT.read_text(), re.DOTALL)
    (config,) = [block for block in blocks if "loadBalancingConfig" in block]
    return json.dumps(json.loads(config))


def fake(step_s: float, *flags: str):
    return running(*flags, module="pippin.serve.fake_server", before=(str(step_s),))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def balanced(*addresses: str):
    """A channel over several servers."""
    options = [("grpc.service_config", service_config()), ("grpc.enable_retries", 1)]
    options.append(("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel("ipv4:" + ",".join(addresses), options) as channel:
        yield channel


def expected(i: int, count: int = 20) -> str:
    return bytes(answer(f"question {i}".encode(), count, i)).decode()


def ask(channel: grpc.Channel, i: int, count: int = 20) -> str:
    """A whole answer, by the method that does not stream."""
    one = pb.GenerateRequest(text=f"question {i}", seed=i, max_tokens=count, request_id=f"r{i}")
    response = method_of("GenerateBatch", channel)(pb.GenerateBatchRequest(requests=[one]), timeout=60)
    (completion,) = response.results[0].completions
    assert completion.finished.finish_reason == pb.FINISH_REASON_LENGTH, completion.finished
    return completion.text


def both_serve(channel: grpc.Channel, *servers: ServerProcess) -> None:
    """Asks until each has answered: a channel begins with the first that it reaches."""
    numbers = itertools.count(10_000)

    def each_has_answered() -> bool:
        ask(channel, next(numbers), 1)
        return all(server.metrics()["num_requests_taken_total"] for server in servers)

    wait_for(each_has_answered, "an answer of each server")


class Traffic:
    """Questions without end, each of which must be answered, and rightly."""

    def __init__(self, channel: grpc.Channel, num_clients: int = 6):
        self._channel, self._stop = channel, threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(num_clients)
        self._clients = [self._threads.submit(self._client, n) for n in range(num_clients)]
        self.answered = 0

    def _client(self, n: int) -> None:
        i = n * 1_000_000
        while not self._stop.is_set():
            i += 1
            assert ask(self._channel, i) == expected(i)
            self.answered += 1

    def go_on(self, count: int) -> None:
        """Waits for so many more answers."""
        until = self.answered + count
        wait_for(
            lambda: self.answered >= until or any(c.done() for c in self._clients), f"{count} answers", 60
        )

    def end(self) -> None:
        """Raises what a client saw."""
        self._stop.set()
        for client in self._clients:
            client.result(60)
        self._threads.shutdown()


def test_no_call_fails_when_one_of_two_is_killed_or_replaced():
    """kill -9 in the middle; the same port again; then both by SIGTERM, one after the other, as a rolling restart does."""
    ports = [str(free_port()), str(free_port())]
    with contextlib.ExitStack() as servers, balanced(*(f"127.0.0.1:{port}" for port in ports)) as channel:

        def start(n: int) -> ServerProcess:
            return servers.enter_context(fake(0.005, "--port", ports[n], *_QUICK))

        first, second = start(0), start(1)
        traffic = Traffic(channel)
        traffic.go_on(50)
        for _ in range(scaled(2, 20)):
            first.signal(signal.SIGKILL)
            first.process.wait()
            traffic.go_on(50)
            first = start(0)
            traffic.go_on(50)
        for _ in range(scaled(1, 10)):
            for n, old in enumerate((first, second)):
                old.signal(signal.SIGTERM)
                assert old.process.wait(30) == 0
                new = start(n)
                first, second = (new, second) if n == 0 else (first, new)
                # gRPC waits a second and more before it looks for a server again that was not there.
                wait_for(lambda server=new: server.metrics()["num_requests_taken_total"] > 0, "traffic", 60)
        traffic.end()
        for server in (first, second):
            wait_for(server.is_idle, "nothing to do")
            metrics = server.metrics()
            assert metrics["num_requests_taken_total"] == metrics["request_success_total{length}"]
            assert "Traceback" not in server.log


def test_a_drained_server_is_left_by_its_clients():
    with fake(0.005) as first, fake(0.005) as second, balanced(first.address, second.address) as channel:
        both_serve(channel, first, second)
        traffic = Traffic(channel)
        traffic.go_on(50)
        with grpc.insecure_channel(first.admin_address) as admin:
            method_of("Drain", admin)(pb.DrainRequest(), timeout=10)
        taken = first.metrics()["num_requests_taken_total"]
        traffic.go_on(100)
        traffic.end()
        assert first.metrics()["num_requests_taken_total"] == taken
        wait_for(first.is_idle, "nothing to do")


def test_a_stream_is_not_sent_twice_when_its_server_dies():
    """What had begun fails, and the client is told; what had not is tried on the other. No token comes twice."""
    with fake(0.02) as first, fake(0.02) as second, balanced(first.address, second.address) as channel:
        both_serve(channel, first, second)
        calls = [
            method_of("Generate", channel)(
                pb.GenerateRequest(text=f"question {i}", seed=i, max_tokens=100), timeout=60
            )
            for i in range(8)
        ]
        texts = ["" for _ in calls]
        for i, call in enumerate(calls):
            assert next(call).HasField("started")
            texts[i] += next(call).delta.text
        first.signal(signal.SIGKILL)
        codes = []
        for i, call in enumerate(calls):
            code = grpc.StatusCode.OK
            try:
                for event in call:
                    texts[i] += event.delta.text
            except grpc.RpcError as error:
                code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
            codes.append(code)
            assert expected(i, 100).startswith(texts[i])
            assert code is not grpc.StatusCode.OK or texts[i] == expected(i, 100)
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, codes
        assert {ask(channel, i) == expected(i) for i in range(10)} == {True}
        wait_for(second.is_idle, "nothing to do")


def test_a_request_that_is_sent_again_while_it_is_served_is_not_served_twice():
    with fake(0.02) as server, grpc.insecure_channel(server.address) as channel:
        request = pb.GenerateRequest(text="once", request_id="once", max_tokens=50)
        call = method_of("Generate", channel)(request, timeout=60)
        next(call)
        with pytest.raises(grpc.RpcError) as twice:
            list(method_of("Generate", channel)(request, timeout=60))
        assert twice.value.code() is grpc.StatusCode.ALREADY_EXISTS  # pyright: ignore[reportAttributeAccessIssue]
        assert list(call)[-1].finished.usage.output_tokens == 50
        wait_for(server.is_idle, "nothing to do")
        assert server.metrics()["num_requests_taken_total"] == 1


def test_sigterm_under_full_load_cuts_no_stream():
    """Some run, some wait, some come while it withdraws: those taken are served, the others told where to go."""
    for _ in range(scaled(1, 20)):
        with (
            fake(0.005, "--withdraw", "1", "--grace", "30") as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            outcomes: list[tuple[grpc.StatusCode, int]] = []

            def client(i: int, channel=channel, outcomes=outcomes) -> None:
                try:
                    events = generate(channel, f"question {i}", max_tokens=60, seed=i)
                    outcomes.append((grpc.StatusCode.OK, events[-1].finished.usage.output_tokens))
                except grpc.RpcError as error:
                    outcomes.append((error.code(), 0))  # pyright: ignore[reportAttributeAccessIssue]

            with concurrent.futures.ThreadPoolExecutor(64) as threads:
                for i in range(60):
                    threads.submit(client, i)
                time.sleep(0.5)
                server.signal(signal.SIGTERM)
                for i in range(60, 160):
                    threads.submit(client, i)
                    time.sleep(0.02)
            assert server.process.wait(40) == 0
        done = [tokens for code, tokens in outcomes if code is grpc.StatusCode.OK]
        assert len(done) >= 60 and set(done) == {60}
        assert {code for code, _ in outcomes} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert len(outcomes) == 160
