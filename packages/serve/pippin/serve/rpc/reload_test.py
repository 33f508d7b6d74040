"""New weights for a server that runs, over loopback: when they are served, and when they are given up."""

import asyncio
import dataclasses
import gc
import pathlib
import tempfile
import threading
import weakref

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from pippin.serve.busy_threads import any_busy
from pippin.serve.engine.testing import answer
from pippin.serve.errors import PreconditionError
from pippin.serve.testing import SlowRunner, fails_with, fake_backend, fields_of, serving, text_of
from pippin.v1 import inference_pb2 as pb


@pytest.fixture
def socket_folder():
    """A folder whose path is short enough for sockets, as a sandbox's are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield pathlib.Path(folder)


def _reloading(read=None, weights=None):
    """A backend whose model has other answers after it was read anew."""
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.01))

    def read_anew():
        if read is not None:
            read()
        held = None if weights is None else weights()
        return lambda: setattr(fake.runner, "letters", 2 if held is None else 3)

    model = dataclasses.replace(fake.backend.model, read_anew=read_anew)
    return dataclasses.replace(fake, backend=dataclasses.replace(fake.backend, model=model))


async def test_reload_serves_the_new_model_and_what_has_begun_by_the_old(socket_folder):
    address = f"unix:{socket_folder}/admin"
    prompt = list(b"hello")
    async with (
        serving(_reloading(), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        model = await served.method("GetModel")(pb.GetModelRequest())
        assert pb.CAPABILITY_RELOAD in model.capabilities
        begun = asyncio.create_task(served.generate(max_tokens=40, seed=1))
        while served.engine.load().generated < 3:
            await asyncio.sleep(0.005)
        reload = asyncio.create_task(served.method("Reload", channel)(pb.ReloadRequest()).code())
        await asyncio.sleep(0.1)
        check = await served.method("Check")(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING and not reload.done()
        late = await served.generate(max_tokens=10, seed=1)
        assert await reload is grpc.StatusCode.OK
        assert text_of(await begun) == bytes(answer(prompt, 40, 1)).decode()
        assert text_of(late) == bytes(answer(prompt, 10, 1, letters=2)).decode()


async def test_a_second_reload_at_once_and_one_that_fails_are_told(socket_folder):
    address, release, wrong = f"unix:{socket_folder}/admin", threading.Event(), []

    def read():
        release.wait(10)
        if wrong:
            raise PreconditionError("The model's files hold another model than is served: dim: 2 -> 3.")

    async with (
        serving(_reloading(read), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        reload = served.method("Reload", channel)
        first = reload(pb.ReloadRequest())
        await asyncio.sleep(0.1)
        async with fails_with(grpc.StatusCode.FAILED_PRECONDITION) as error:
            await reload(pb.ReloadRequest())
        assert "already" in error[0].details()
        release.set()
        await first
        assert served.runner.letters == 2
        wrong.append(True)
        async with fails_with(grpc.StatusCode.FAILED_PRECONDITION) as error:
            async with asyncio.timeout(5):
                await reload(pb.ReloadRequest())
        assert "dim: 2 -> 3" in error[0].details()
        assert await served.generate(max_tokens=2)


class _Weights:
    """What takes much memory."""


async def test_a_reload_gives_up_after_its_timeout_and_holds_nothing(socket_folder):
    address, made = f"unix:{socket_folder}/admin", []

    def weights():
        found = _Weights()
        made.append(weakref.ref(found))
        return found

    async with (
        serving(_reloading(weights=weights), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        reload = served.method("Reload", channel)
        begun = asyncio.create_task(served.generate(max_tokens=400, ignore_eos=True, seed=1))
        while served.engine.load().generated < 3:
            await asyncio.sleep(0.005)
        async with fails_with(grpc.StatusCode.FAILED_PRECONDITION) as error:
            await reload(pb.ReloadRequest(timeout=Duration(nanos=300_000_000)))
        assert "1 requests still run after 0.3 s" in error[0].details()
        # The next is served at once, by the old weights, and the new ones are gone.
        late = await served.generate(max_tokens=3, seed=1)
        assert text_of(late) == bytes(answer(list(b"hello"), 3, 1)).decode() and not begun.done()
        gc.collect()
        assert [ref() for ref in made] == [None]
        assert text_of(await begun) == bytes(answer(list(b"hello"), 400, 1)).decode()
        await reload(pb.ReloadRequest(timeout=Duration(seconds=10)))
        assert served.runner.letters == 3


@pytest.mark.parametrize("how", ["cancels", "deadline"])
async def test_a_caller_who_goes_gives_a_reload_up(socket_folder, how, caplog):
    address = f"unix:{socket_folder}/admin"
    async with (
        serving(_reloading(), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        reload = served.method("Reload", channel)
        begun = asyncio.create_task(served.generate(max_tokens=400, ignore_eos=True, seed=1))
        while served.engine.load().generated < 3:
            await asyncio.sleep(0.005)
        call = reload(pb.ReloadRequest(), timeout=0.3 if how == "deadline" else None)
        if how == "cancels":
            await asyncio.sleep(0.2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            async with fails_with(grpc.StatusCode.DEADLINE_EXCEEDED):
                await call
        assert text_of(await served.generate(max_tokens=3, seed=1)) and not begun.done()
        await begun
        assert served.runner.letters == 26
        gc.collect()
        assert "Nobody waits" in caplog.text and "Traceback" not in caplog.text


async def test_a_caller_who_goes_while_files_are_read_gives_a_reload_up(socket_folder):
    address, release = f"unix:{socket_folder}/admin", threading.Event()
    async with (
        serving(_reloading(lambda: release.wait(20)), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        reload = served.method("Reload", channel)
        first = reload(pb.ReloadRequest())
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0.1)
        async with fails_with(grpc.StatusCode.FAILED_PRECONDITION) as error:
            await reload(pb.ReloadRequest())  # two models are in memory still
        assert "already" in error[0].details()
        release.set()
        while any_busy():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert served.runner.letters == 26
        await reload(pb.ReloadRequest())
        assert served.runner.letters == 2


@pytest.mark.parametrize("timeout", [Duration(), Duration(seconds=-1), Duration(seconds=1, nanos=-5)])
async def test_a_reload_with_a_timeout_that_is_none_is_refused(socket_folder, timeout):
    address = f"unix:{socket_folder}/admin"
    async with (
        serving(_reloading(), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        async with fails_with(grpc.StatusCode.INVALID_ARGUMENT) as error:
            await served.method("Reload", channel)(pb.ReloadRequest(timeout=timeout))
        assert fields_of(error[0]) == ["timeout"]


async def test_a_reload_that_waits_when_the_server_stops_is_told(socket_folder):
    address = f"unix:{socket_folder}/admin"
    async with (
        serving(_reloading(), admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        begun = asyncio.create_task(served.generate(max_tokens=400, ignore_eos=True))
        while served.engine.load().generated < 3:
            await asyncio.sleep(0.005)
        call = asyncio.create_task(served.method("Reload", channel)(pb.ReloadRequest()).code())
        await asyncio.sleep(0.1)
        await asyncio.to_thread(served.engine.stop, 0.1)
        assert await call is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError):
            await begun


async def test_a_server_that_cannot_reload_says_so(socket_folder):
    address = f"unix:{socket_folder}/admin"
    async with (
        serving(admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
        fails_with(grpc.StatusCode.UNIMPLEMENTED),
    ):
        await served.method("Reload", channel)(pb.ReloadRequest())
