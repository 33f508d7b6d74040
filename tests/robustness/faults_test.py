"""Steps that hang and steps that fail: health says so, streams are told, others go on, and all is as before afterwards."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.testing import FakeRunner, answer
from pippin.serve.options import Options
from pippin.serve.testing import Served, fake_backend, serving, text_of
from pippin.v1 import inference_pb2 as pb
from tests.robustness.scale import scaled

_SERVING, _NOT = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class FaultyRunner(FakeRunner):
    """Fails where it is told to, once or each time."""

    def __init__(self, limits):
        super().__init__(limits)
        self.fail_steps = 0  # the next ones
        self.fail_resets = 0

    def run(self, rows):
        if self.fail_steps:
            self.fail_steps -= 1
            raise MemoryError("no room on the device")
        return super().run(rows)

    def reset(self):
        if getattr(self, "fail_resets", 0):
            self.fail_resets -= 1
            raise MemoryError("no room for a cache")
        super().reset()


@contextlib.asynccontextmanager
async def checked(*, stall_s: float = 60.0):
    """A server with such a runner, which is afterwards as it was before."""
    tasks, threads = len(asyncio.all_tasks()), threading.active_count()
    fake = fake_backend(make_runner=FaultyRunner, queue=QueueLimits(stall_s=stall_s))
    async with serving(fake, http_port=0) as served:
        await is_well(served)
        yield served
        await served.idle()
        await is_well(served)
        await served.idle()
        load = served.engine.load()
        assert (load.used_pages, load.waiting_tokens, served.server.frontend._open) == (0, 0, {})
        assert load.taken == ended(served)
    for _ in range(100):
        if len(asyncio.all_tasks()) <= tasks and threading.active_count() <= threads + 4:
            break
        await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) <= tasks
    assert threading.active_count() <= threads + 8  # asyncio's own pool stays


def ended(served: Served) -> int:
    """How many requests ended, by the metrics."""
    (metrics, *_) = served.engine.observer._observers
    return sum(int(counter._value.get()) for counter in metrics._ended.values())


async def is_well(served: Served) -> None:
    """A canary's answer is the known one."""
    events = await served.generate("canary", max_tokens=12, seed=3)
    assert text_of(events).encode() == bytes(answer(b"canary", 12, 3))


async def code_of(call) -> grpc.StatusCode:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        assert "device" not in str(error) and "Memory" not in str(error)
        return error.code()
    return grpc.StatusCode.OK


async def status(served: Served):
    return (await served.method("Check")(health_pb2.HealthCheckRequest(), timeout=5)).status


async def test_a_step_that_hangs_is_seen_in_health_and_held_against_nobody():
    async with checked(stall_s=0.5) as served:
        watch = served.method("Watch")(health_pb2.HealthCheckRequest(service="pippin.v1.Inference"))
        assert (await watch.read()).status == _SERVING
        served.runner.hold.clear()
        calls = [served.method("Generate")(pb.GenerateRequest(text="x", max_tokens=5)) for _ in range(20)]
        start = time.monotonic()
        assert (await watch.read()).status == _NOT
        assert time.monotonic() - start < 0.5 + 1.0
        # Everything but the engine answers meanwhile.
        assert await status(served) == _NOT
        assert (await served.method("GetModel")(pb.GetModelRequest(), timeout=5)).name == "letters"
        count = await served.method("CountTokens")(pb.CountTokensRequest(text="abc"), timeout=5)
        assert count.num_tokens == 3
        late = served.method("Generate")(pb.GenerateRequest(text="x", max_tokens=5), timeout=0.2)
        assert await code_of(late) is grpc.StatusCode.DEADLINE_EXCEEDED
        calls[0].cancel()
        served.runner.hold.set()
        assert (await watch.read()).status == _SERVING
        codes = await asyncio.gather(*map(code_of, calls[1:]))
        assert set(codes) == {grpc.StatusCode.OK}
        watch.cancel()


async def test_a_server_whose_step_hangs_still_stops_and_tells_its_streams():
    fake = fake_backend(make_runner=FaultyRunner)
    async with serving(fake) as served:
        fake.runner.hold.clear()
        calls = [served.method("Generate")(pb.GenerateRequest(text="x", max_tokens=5)) for _ in range(5)]
        ends = [asyncio.create_task(code_of(call)) for call in calls]
        await asyncio.sleep(0.2)
        options = dataclasses.replace(Options(), withdraw_s=0.0, grace_s=0.5)
        start = time.monotonic()
        stop = asyncio.create_task(served.server.stop(options))
        codes = await asyncio.gather(*ends)
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        fake.runner.hold.set()
        await stop
        assert time.monotonic() - start < 15


@pytest.mark.parametrize("failures", [1, 3, 20])
async def test_steps_that_fail_for_no_request_end_some_and_never_the_server(failures):
    async with checked() as served:
        for _ in range(scaled(3, 50)):
            calls = [
                served.method("Generate")(pb.GenerateRequest(text=f"x{i}", max_tokens=40)) for i in range(6)
            ]
            await calls[0].read()
            served.runner.fail_steps = failures
            codes = await asyncio.gather(*map(code_of, calls))
            assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL}
            assert codes.count(grpc.StatusCode.INTERNAL) <= failures
            served.runner.fail_steps = 0
            assert await status(served) == _SERVING


async def test_one_request_that_breaks_every_step_ends_alone_each_time():
    async with checked() as served:
        for i in range(scaled(20, 1_000)):
            served.runner.broken = {f"/bad{i}/0"}
            requests = [
                pb.GenerateRequest(text=f"{n}", request_id=n, max_tokens=8, seed=1)
                for n in (f"bad{i}", "a", "b")
            ]
            calls = [served.method("Generate")(request) for request in requests]
            bad, *good = await asyncio.gather(*map(code_of, calls))
            assert bad is grpc.StatusCode.INTERNAL and set(good) == {grpc.StatusCode.OK}


async def test_a_cache_that_cannot_be_made_is_made_when_it_can(monkeypatch):
    monkeypatch.setattr("pippin.serve.engine.engine._RESET_AGAIN_S", 0.05)
    async with checked() as served:
        served.runner.fail_steps, served.runner.fail_resets = 1, 20
        call = served.method("Generate")(pb.GenerateRequest(text="x", max_tokens=5))
        async with asyncio.timeout(10):
            while await status(served) == _SERVING and served.runner.fail_resets:
                await asyncio.sleep(0.01)
        assert await code_of(call) in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL)
