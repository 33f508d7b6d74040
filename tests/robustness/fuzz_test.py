"""Bytes, messages and JSON that nobody foresaw: each is answered, refused by the path of a field, or too much."""

import asyncio
import json
import random
import time

import grpc
import grpc.aio
import httpx
import pytest

from pippin.serve.testing import details_of
from pippin.v1 import inference_pb2 as pb
from tests.robustness.hostile import CONSTRAINTS, json_body, message_bytes
from tests.robustness.invariants import baseline
from tests.robustness.process import method_of
from tests.robustness.scale import scaled
from tests.robustness.shared import shared_server

INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
# Of requests that are as they should be: what they ask for is not there, comes too late, or is being done.
_RIGHT = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ALREADY_EXISTS,
    EXHAUSTED,
)
_METHODS = ("Generate", "GenerateBatch", "Tokenize", "CountTokens", "Embed", "GetModel")
_AT_ONCE = 32


async def spread(count: int, one) -> None:
    """Runs `one(i)` for so many numbers, some at a time."""
    numbers = iter(range(count))

    async def work() -> None:
        for i in numbers:
            await one(i)

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))


async def call(channel: grpc.aio.Channel, name: str, data: bytes) -> grpc.aio.AioRpcError | None:
    """How a call of these bytes ends; None: well."""
    path = f"/pippin.v1.Inference/{name}"
    try:
        if name == "Generate":
            _ = [event async for event in channel.unary_stream(path)(data, timeout=60)]
        else:
            await channel.unary_unary(path)(data, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_messages_that_nobody_foresaw():
    server = shared_server()
    before, codes = baseline(server), {}
    async with grpc.aio.insecure_channel(server.address) as channel:

        async def one(i: int) -> None:
            rng = random.Random(i)
            name = rng.choices(_METHODS, [6, 2, 1, 1, 1, 1])[0]
            data = message_bytes(rng, name)
            error = await call(channel, name, data)
            code = grpc.StatusCode.OK if error is None else error.code()
            codes[code] = codes.get(code, 0) + 1
            if error is not None and code is INVALID:
                violations = details_of(error)["BadRequest"].field_violations
                assert violations and all(v.description for v in violations), (i, name, error)
            else:
                assert error is None or code in _RIGHT, (i, name, data[:300], error)

        await spread(scaled(3_000, 100_000), one)
    assert codes[INVALID] > 100 and codes[grpc.StatusCode.OK] > 100, codes
    by_reason = before.check()
    assert not by_reason.keys() & {"failed", "shutdown"}, by_reason


async def test_json_that_nobody_foresaw():
    server = shared_server()
    before, statuses = baseline(server), {}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

        async def one(i: int) -> None:
            rng = random.Random(i)
            path = rng.choice(("v1/completions", "v1/chat/completions"))
            body = json_body(rng, chat="chat" in path)
            response = await http.post(path, content=body, headers={"content-type": "application/json"})
            status = response.status_code
            statuses[status] = statuses.get(status, 0) + 1
            assert status in (200, 400, 404, 409, 413, 429, 504), (i, body[:500], response.text)
            if status != 200:
                error = response.json()["error"]
                assert error["message"] and error["type"], (i, body[:500])

        await spread(scaled(1_500, 50_000), one)
    assert statuses[200] > 30 and statuses[400] > 100, statuses
    by_reason = before.check()
    assert not by_reason.keys() & {"failed", "shutdown"}, by_reason


@pytest.mark.parametrize("name", CONSTRAINTS)
async def test_a_hostile_constraint_is_refused_or_ends_and_holds_nobody_up(name):
    server = shared_server()
    before = baseline(server)
    async with grpc.aio.insecure_channel(server.address) as channel:
        generate = method_of("Generate", channel)
        longest, stop = 0.0, asyncio.Event()

        async def stand_by() -> None:
            """Somebody else's stream, whose longest wait for a token is noted."""
            nonlocal longest
            while not stop.is_set():
                last = time.monotonic()
                request = pb.GenerateRequest(
                    text="others", max_tokens=200, ignore_eos=True, request_id="others"
                )
                async for _ in generate(request):
                    longest, last = max(longest, time.monotonic() - last), time.monotonic()

        other = asyncio.create_task(stand_by())
        try:
            start = time.monotonic()
            field, value = CONSTRAINTS[name]
            request = pb.GenerateRequest(text="x", max_tokens=50, n=4, **{field: value})
            error = await call(channel, "Generate", request.SerializeToString())
            took = time.monotonic() - start
        finally:
            stop.set()
            await other
    assert error is None or error.code() is INVALID, error
    assert took < 20 and longest < 3, (took, longest)
    assert "failed" not in before.check()


@pytest.mark.parametrize("kind", ["batch", "chat", "ids"])
async def test_a_message_that_takes_a_hundred_times_its_bytes_is_gone_with_its_call(kind):
    server = shared_server()
    before = baseline(server)
    empty = b"\x0a\x00" * ((2 << 20) - 1000)
    chat = b"\x22" + _varint(len(empty)) + empty
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300] * (2 << 20))).SerializeToString()
    name, data = {"batch": ("GenerateBatch", empty), "chat": ("Generate", chat), "ids": ("Generate", ids)}[
        kind
    ]
    async with grpc.aio.insecure_channel(server.address) as channel:
        for _ in range(scaled(12, 200)):
            error = await call(channel, name, data[: (4 << 20) - 100] if kind != "ids" else data[:0] + data)
            assert error is not None and error.code() in (INVALID, EXHAUSTED)
    before.check()


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b'"a",' * 200_000 + b'"a"], "stop": [' + b'"aaaa",' * 20_000 + b'"b"]}',
        b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(300_000)) + b"}}",
        b'{"prompt": ' + b"[" + b"[1]," * 900_000 + b"[1]]}",
        b'{"prompt": "a", "stop": ' + b"[" + b'"",' * 1_200_000 + b'""]}',
        json.dumps({"prompt": "a", "x" * (1 << 20): 1}).encode(),
        b'{"prompt": "a", ' + b",".join(b'"k%d": 1' % i for i in range(300_000)) + b"}",
    ],
    ids=["prompts", "logit_bias", "ids", "stops", "long name", "many names"],
)
async def test_a_body_with_far_too_much_is_refused_and_holds_nobody_up(body):
    server = shared_server()
    before = baseline(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for _ in range(scaled(3, 50)):
            start = time.monotonic()
            response = await http.post(
                "v1/completions", content=body, headers={"content-type": "application/json"}
            )
            assert response.status_code in (400, 413) and len(response.content) < 20_000, response.text[:300]
            assert time.monotonic() - start < 10
    before.check()


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])
