"""Deadlines in every stage, by the call and by the request: told as such, never as a length, and nothing is held."""

import asyncio
import time

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration

from pippin.v1 import inference_pb2 as pb
from tests.robustness.invariants import baseline
from tests.robustness.process import method_of
from tests.robustness.scale import scaled
from tests.robustness.shared import shared_server

_LONG = pb.GenerateRequest(text="x", max_tokens=480, ignore_eos=True)
_EXPIRED = grpc.StatusCode.DEADLINE_EXCEEDED
_ROWS = 8


async def ends(call) -> tuple[grpc.StatusCode, list[pb.GenerateResponse]]:
    """How a stream ended, and what it told."""
    events: list[pb.GenerateResponse] = []
    try:
        async for event in call:
            events.append(event)
    except grpc.aio.AioRpcError as error:
        return error.code(), events
    return grpc.StatusCode.OK, events


def request(milliseconds: int, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(timeout=Duration(nanos=milliseconds * 1_000_000), **fields)


@pytest.mark.parametrize("stage", ["prefill", "decode", "queue"])
@pytest.mark.parametrize("by", ["timeout", "deadline"])
async def test_a_deadline_that_passes_is_told_as_one(stage, by):
    server = shared_server()
    before = baseline(server)
    # Of prompts that no step holds at once; of answers that take a second.
    text = "a prompt of many tokens " * 19 if stage == "prefill" else "x"
    most = 20 if stage == "prefill" else 480
    codes: list[grpc.StatusCode] = []
    async with grpc.aio.insecure_channel(server.address) as channel:
        generate = method_of("Generate", channel)
        filling = [generate(_LONG) for _ in range(_ROWS)] if stage == "queue" else []
        for call in filling:
            await call.read()
        for i in range(scaled(20, 1_000)):
            milliseconds = 1 + i % 10 if stage == "prefill" else 20 + i % 60
            fields = {"text": f"{i} {text}", "max_tokens": most, "ignore_eos": True}
            if by == "timeout":
                call = generate(request(milliseconds, **fields), timeout=30)
            else:
                call = generate(pb.GenerateRequest(**fields), timeout=milliseconds / 1000)
            start = time.monotonic()
            code, events = await ends(call)
            assert time.monotonic() - start < 3
            codes.append(code)
            reasons = [e.finished.finish_reason for e in events if e.HasField("finished")]
            tokens = sum(len(e.delta.token_ids) for e in events)
            if code is grpc.StatusCode.OK:
                assert reasons == [pb.FINISH_REASON_LENGTH] and tokens == most
            else:
                assert code is _EXPIRED and tokens < most
                assert reasons in ([], [pb.FINISH_REASON_DEADLINE])
                assert by == "deadline" or reasons or not events
        for call in filling:
            call.cancel()
    assert codes.count(_EXPIRED) >= len(codes) // 4, codes
    by_reason = before.check()
    assert by_reason.keys() <= {"deadline", "length", "cancelled"}, by_reason
    if by == "timeout":  # of those that were tokenized in time
        assert by_reason.get("deadline", 0) <= codes.count(_EXPIRED)


async def test_deadlines_over_http_are_504s():
    server = shared_server()
    before = baseline(server)
    body = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "timeout": 0.05}
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        responses = await asyncio.gather(
            *(http.post("v1/completions", json=body) for _ in range(scaled(20, 1_000)))
        )
    statuses = {response.status_code for response in responses}
    assert statuses <= {504, 429} and 504 in statuses
    assert before.check().keys() == {"deadline"}


@pytest.mark.parametrize("nanos", [1, 1_000])
async def test_a_deadline_that_has_passed_before_it_begins(nanos):
    server = shared_server()
    before = baseline(server)
    async with grpc.aio.insecure_channel(server.address) as channel:
        for _ in range(scaled(20, 1_000)):
            call = method_of("Generate", channel)(pb.GenerateRequest(text="x", timeout=Duration(nanos=nanos)))
            assert (await ends(call))[0] is _EXPIRED
    before.check()
