"""Ten times as much as can be done: what is done stays as much, what was taken is done in time, the rest is told at once."""

import asyncio
import dataclasses
import statistics
import time

import grpc
import grpc.aio
import pytest

from pippin.serve.testing import details_of
from pippin.v1 import inference_pb2 as pb
from tests.robustness.invariants import baseline
from tests.robustness.process import ServerProcess, method_of, running, wait_for
from tests.robustness.scale import scaled
from tests.robustness.shared import shared_server

_TOKENS = 128
_ROWS = 8
# What must be left of the peak. Clients and server share the machine's cores, and ten times the calls are the clients'
# work too: //benchmarks:serve measures it with that apart. What is computed is never thrown away, which is asserted.
_LEAST_OF_PEAK = 0.3
_QUEUE = 64


@dataclasses.dataclass
class Seen:
    """What clients saw."""

    done: int = 0
    first_done_s: float | None = None  # after the first was asked
    first_s: list[float] = dataclasses.field(
        default_factory=list
    )  # to the first token, of those that were taken
    refused_s: list[float] = dataclasses.field(default_factory=list)


async def ask(channel: grpc.aio.Channel, i: int, seen: Seen) -> None:
    start = time.monotonic()
    request = pb.GenerateRequest(text=f"question {i}", max_tokens=_TOKENS, ignore_eos=True)
    try:
        first = None
        async for event in method_of("Generate", channel)(request, timeout=60):
            if first is None and event.HasField("delta"):
                first = time.monotonic() - start
                seen.first_s.append(first)
        seen.done += 1
    except grpc.aio.AioRpcError as error:
        seen.refused_s.append(time.monotonic() - start)
        # gRPC's own protection of a connection refuses streams before the server sees them: they may be sent again.
        if not (error.code() is grpc.StatusCode.UNAVAILABLE and "RST_STREAM" in (error.details() or "")):
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
            assert details_of(error)["RetryInfo"].retry_delay.seconds >= 1


async def closed(server: ServerProcess, seconds: float) -> float:
    """Requests a second, where each client waits for its answer: as many as are served at a time."""
    seen = Seen()
    async with grpc.aio.insecure_channel(server.address) as channel:
        start = time.monotonic()

        async def client(i: int) -> None:
            while time.monotonic() - start < seconds:
                await ask(channel, i, seen)

        await asyncio.gather(*(client(i) for i in range(_ROWS)))
        return seen.done / (time.monotonic() - start)


async def open_loop(server: ServerProcess, rate: float, seconds: float) -> tuple[Seen, float]:
    """So many requests a second, whatever became of the earlier ones; and how many were done a second meanwhile."""
    seen, tasks = Seen(), []
    async with grpc.aio.insecure_channel(server.address) as channel:
        start = time.monotonic()
        i = 0
        while (now := time.monotonic() - start) < seconds:
            while i < now * rate:
                tasks.append(asyncio.create_task(ask(channel, i, seen)))
                i += 1
            if seen.done and seen.first_done_s is None:
                seen.first_done_s = now
            await asyncio.sleep(0.005)
        done, took = seen.done, time.monotonic() - start - (seen.first_done_s or seconds)
        await asyncio.gather(*tasks)
    return seen, done / took


async def test_ten_times_too_much_is_mostly_refused_and_the_rest_served_as_before():
    server = shared_server()
    before = baseline(server)
    peak = await closed(server, scaled(4, 30))
    memory_mib = server.memory_mib()
    seen, goodput = await open_loop(server, 10 * peak, scaled(6, 180))
    assert len(seen.refused_s) > seen.done / 2, (seen.done, len(seen.refused_s))
    assert goodput >= _LEAST_OF_PEAK * peak, (goodput, peak)
    # What waits when it is taken is the queue at most: so it is served after the queue's time, and twice that is ample.
    slowest = statistics.quantiles(seen.first_s, n=100)[98]
    assert slowest < 3 * (_QUEUE + _ROWS) / goodput + 1, slowest
    refused = statistics.median(seen.refused_s)
    # Of this process, which makes ten times as many calls as it has cores for; see the next test.
    assert refused < 2, f"{refused:.3f} s until a refusal"
    assert server.memory_mib() < memory_mib + 64
    by_reason = before.check()
    assert by_reason.keys() == {"length"}, by_reason


def test_a_refusal_takes_milliseconds():
    """With a client that has nothing else to do, and steps so long that nothing ends meanwhile."""
    slow = running(module="pippin.serve.fake_server", before=("5",))
    with slow as server, grpc.insecure_channel(server.address) as channel:
        generate = method_of("Generate", channel)
        # More completions than run and wait together.
        full = [generate(pb.GenerateRequest(text=f"{i}", n=16 if i < 20 else 1)) for i in range(60)]
        wait_for(lambda: server.load()["waiting"] == 256, "a full queue")
        times = []
        for i in range(50):
            start = time.monotonic()
            with pytest.raises(grpc.RpcError) as refused:
                next(generate(pb.GenerateRequest(text=f"one more {i}", n=16)))
            times.append(time.monotonic() - start)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # pyright: ignore[reportAttributeAccessIssue]
        for call in full:
            call.cancel()
        wait_for(server.is_idle, "nothing to do")
    assert statistics.median(times) < 0.05, times  # 1 or 2 ms, where nothing else runs on the machine
