"""Clients that go, do not read, do not speak, or never stop."""

import asyncio
import contextlib
import json
import socket
import time

import grpc
import grpc.aio
import pytest

from pippin.v1 import inference_pb2 as pb
from tests.robustness import wire
from tests.robustness.invariants import baseline
from tests.robustness.process import ServerProcess, method_of, wait_for
from tests.robustness.scale import scaled
from tests.robustness.shared import shared_server

_GENERATE = "/pippin.v1.Inference/Generate"
_LONG = pb.GenerateRequest(text="a long answer, please", max_tokens=300, ignore_eos=True)
# So many requests fill all rows, and one more waits.
_ROWS = 8


def freed(server: ServerProcess) -> float:
    """Seconds until the server holds nothing."""
    start = time.monotonic()
    wait_for(server.is_idle, "all is free", 10)
    return time.monotonic() - start


@contextlib.asynccontextmanager
async def channel_of(server: ServerProcess, *options: tuple[str, int]):
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        yield channel


@pytest.mark.parametrize(
    "stage", ["at once", "in the queue", "before the first token", "after some tokens", "n"]
)
async def test_a_call_that_is_cancelled_holds_nothing_any_more(stage):
    server = shared_server()
    before = baseline(server)
    cancelled, count = 0, scaled(40, 1_000)
    async with channel_of(server) as channel:
        generate = method_of("Generate", channel)
        filling = []
        if stage == "in the queue":
            filling = [generate(_LONG) for _ in range(_ROWS)]
            await asyncio.gather(*(call.read() for call in filling))
        for i in range(count):
            request = pb.GenerateRequest()
            request.CopyFrom(_LONG)
            request.text = f"{i} " * (40 if stage == "before the first token" else 1)
            request.n = 4 if stage == "n" else 1
            call = generate(request)
            reads = {
                "at once": 0,
                "in the queue": 1,
                "before the first token": 1,
                "after some tokens": 4,
                "n": 3,
            }[stage]
            for _ in range(reads):
                await call.read()
            cancelled += call.cancel()
            if filling and i % _ROWS == 0:  # those that are served end, and others take their turns
                filling[i // _ROWS % _ROWS].cancel()
                filling[i // _ROWS % _ROWS] = generate(_LONG)
                await filling[i // _ROWS % _ROWS].read()
        for call in filling:
            call.cancel()
        await asyncio.sleep(0)
    assert freed(server) < 5 and cancelled == count
    by_reason = before.check()
    assert by_reason.keys() <= {"cancelled"}, by_reason
    assert stage == "at once" or by_reason["cancelled"] >= count


async def test_a_cancelled_request_computes_no_step_more():
    """In steps, not in seconds."""
    server = shared_server()
    before = baseline(server)
    async with channel_of(server) as channel, grpc.aio.insecure_channel(server.admin_address) as admin:
        load = method_of("GetLoad", admin)
        for _ in range(scaled(5, 100)):
            call = method_of("Generate", channel)(_LONG)
            for _ in range(3):
                await call.read()
            call.cancel()
            wait_for(server.is_idle, "the request is gone")
            steps = (await load(pb.GetLoadRequest())).num_steps
            await asyncio.sleep(0.05)
            assert (await load(pb.GetLoadRequest())).num_steps <= steps + 1, (
                "but the one that was being computed"
            )
    before.check()


async def test_readers_who_are_slow_get_all_and_those_who_never_read_hold_nothing():
    server = shared_server()
    before = baseline(server)
    request = pb.GenerateRequest(text="x", max_tokens=400, ignore_eos=True, n=4, logprobs=20)
    async with channel_of(
        server, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)
    ) as channel:
        generate = method_of("Generate", channel)
        never = [generate(request) for _ in range(scaled(4, 40))]
        slow, told = generate(request), [0] * 4
        while (event := await slow.read()) is not grpc.aio.EOF:
            told[event.delta.index] += len(event.delta.token_ids)
            await asyncio.sleep(0.02)
        assert told == [400] * 4
        wait_for(server.is_idle, "those who do not read are dropped")
        del never
    by_reason = before.check()
    assert by_reason.keys() <= {"cancelled", "length"}, by_reason


async def test_a_connection_that_is_cut_frees_all_its_calls():
    server = shared_server()
    before = baseline(server)
    for _ in range(scaled(5, 200)):
        async with channel_of(server, ("grpc.use_local_subchannel_pool", 1)) as channel:
            calls = [method_of("Generate", channel)(_LONG) for _ in range(20)]
            await calls[0].read()
        assert freed(server) < 5
    before.check()


def test_streams_that_are_reset_at_once_take_nothing_from_others():
    """CVE-2023-44487, without waiting for any answer."""
    server = shared_server()
    before = baseline(server)
    slowest, data = 0.0, pb.GenerateRequest(text="x", max_tokens=5).SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        model = method_of("GetModel", channel)
        for _ in range(scaled(5, 100)):
            with (
                wire.connected(server.address) as connection,
                contextlib.suppress(ConnectionError, TimeoutError),
            ):
                connection.sendall(wire.hello())
                for i in range(500):
                    stream = 2 * i + 1
                    call = wire.headers(stream, _GENERATE)
                    connection.sendall(call + wire.message(stream, data) * (i % 2) + wire.reset(stream))
            start = time.monotonic()
            assert model(pb.GetModelRequest(), timeout=10).name == "tiny"
            slowest = max(slowest, time.monotonic() - start)
    assert slowest < 3
    before.check()


def test_headers_without_end_are_not_kept_and_pings_without_end_cut_off():
    """The flood of CONTINUATION frames, and that of pings."""
    server = shared_server()
    before = baseline(server)
    with wire.connected(server.address) as connection:
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(wire.hello() + wire.headers(1, _GENERATE, ends=False))
            for _ in range(scaled(10_000, 200_000)):  # 80 MB, of which nothing may be kept
                connection.sendall(wire.continuation(1, 8_000))
        before.check()
    with wire.connected(server.address) as connection:
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(wire.hello())
            for _ in range(20_000):
                connection.sendall(wire.ping())
        assert not wire.is_open(connection, 5)
    before.check()


@pytest.mark.parametrize("size", [20 << 10, 100 << 10, 4 << 20])
def test_headers_that_are_huge_are_refused(size):
    """CVE-2025-48956."""
    server = shared_server()
    before = baseline(server)
    with grpc.insecure_channel(server.address, [("grpc.max_metadata_size", 8 << 20)]) as channel:
        for _ in range(scaled(5, 100)):
            with pytest.raises(grpc.RpcError) as refused:
                method_of("GetModel", channel)(pb.GetModelRequest(), metadata=[("x", "y" * size)], timeout=30)
            code = refused.value.code()  # pyright: ignore[reportAttributeAccessIssue]
            assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE), refused.value
    http = server.url.removeprefix("http://").rstrip("/")
    with wire.connected(http) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /load HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * size)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    before.check()


def test_connections_that_say_nothing_take_no_place_for_good():
    server = shared_server()
    before = baseline(server)
    http = server.url.removeprefix("http://").rstrip("/")
    with contextlib.ExitStack() as stack:
        for i in range(scaled(200, 800)):
            connection = stack.enter_context(wire.connected(server.address if i % 2 else http))
            if i % 3 == 0:
                connection.sendall(wire.hello()[: 5 + i % 20])
        start = time.monotonic()
        with grpc.insecure_channel(server.address) as channel:
            assert method_of("GetModel", channel)(pb.GetModelRequest(), timeout=10).name == "tiny"
        assert server.load()["serving"] and time.monotonic() - start < 5
    before.check()


@pytest.mark.parametrize("stream", [True, False])
async def test_http_clients_that_go_or_never_read(stream):
    server = shared_server()
    before = baseline(server)
    http = server.url.removeprefix("http://").rstrip("/")
    body = {"prompt": "x", "max_tokens": 400, "n": 2, "ignore_eos": True, "stream": stream, "logprobs": 20}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    for i in range(scaled(20, 1_000)):
        with wire.connected(http) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head.encode() + data[: None if i % 4 else len(data) // 2])
            if i % 2:
                await asyncio.sleep(0.02)
    assert freed(server) < 10
    before.check()
