"""A server with a model whose every answer is known, for tests of the edge."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from pippin.serve.backend import Backend
from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.engine.request import Sampled, Sums
from pippin.serve.engine.scheduler import Limits, Row
from pippin.serve.engine.testing import VOCAB_SIZE, FakeRunner, token_bytes
from pippin.serve.options import Options
from pippin.serve.rpc.service import client_method
from pippin.serve.served_model import ServedModel
from pippin.serve.server import Server, start
from pippin.v1 import inference_pb2 as pb

LIMITS = Limits(num_pages=64, page_size=16, max_requests=8)
MODEL = ServedModel(
    name="letters",
    vocab_size=VOCAB_SIZE,
    context_length=512,
    stop_ids=frozenset({0}),
    encode=lambda text: list(text.encode()),
    encode_chat=lambda messages: list("".join(f"{m.role}:{m.content}\n" for m in messages).encode()),
)
_DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.QuotaFailure,
    error_details_pb2.RetryInfo,
)


class SlowRunner(FakeRunner):
    """Takes a while for each step."""

    def __init__(self, limits: Limits, step_s: float):
        super().__init__(limits)
        self._step_s = step_s

    def run(self, rows: Sequence[Row]) -> list[list[Sampled] | Sums]:
        time.sleep(self._step_s)
        return super().run(rows)


@dataclasses.dataclass(frozen=True)
class Fake:
    """A backend and the runner under it."""

    backend: Backend
    runner: FakeRunner


def fake_backend(
    *,
    limits: Limits = LIMITS,
    queue: QueueLimits | None = None,
    model: ServedModel = MODEL,
    make_runner: Callable[[Limits], FakeRunner] = FakeRunner,
) -> Fake:
    """A backend without a model."""
    runner = make_runner(limits)
    return Fake(Backend(Engine(runner, limits, token_bytes, queue=queue or QueueLimits()), model), runner)


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that runs, and a client of it."""

    server: Server
    runner: FakeRunner
    channel: grpc.aio.Channel

    @property
    def engine(self) -> Engine:
        return self.server.engine

    @property
    def url(self) -> str:
        """Of HTTP, where `http_port` was given."""
        assert self.server.http is not None, "http_port"
        return f"http://{self.server.http.address}"

    async def idle(self) -> None:
        """Waits until the engine has nothing to do. Raises TimeoutError."""
        async with asyncio.timeout(5):
            while self.engine.load().num_running or self.engine.load().num_waiting:
                await asyncio.sleep(0.005)

    def method(self, name: str, channel: grpc.aio.Channel | None = None) -> Any:
        """What calls a method of Inference, Admin or Health, such as "Generate"."""
        services = [
            *pb.DESCRIPTOR.services_by_name.values(),
            *health_pb2.DESCRIPTOR.services_by_name.values(),
        ]
        (method,) = [m for s in services for m in s.methods if m.name == name]
        return client_method(channel or self.channel, method)

    async def generate(self, text: str = "hello", **fields: Any) -> list[pb.GenerateResponse]:
        """All events of a call."""
        call = self.method("Generate")(pb.GenerateRequest(text=text, **fields))
        return [event async for event in call]


@contextlib.asynccontextmanager
async def serving(fake: Fake | None = None, **options: Any) -> AsyncIterator[Served]:
    """A server on a port of loopback."""
    fake = fake or fake_backend()
    given = Options(**{"port": 0, "withdraw_s": 0.0, "grace_s": 5.0, **options})
    server = await start(given, fake.backend)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Served(server, fake.runner, channel)
    finally:
        fake.runner.hold.set()
        await server.stop(dataclasses.replace(given, grace_s=0.0))


@contextlib.contextmanager
def serving_in_thread(step_s: float = 0.0, **options: Any) -> Iterator[str]:
    """A server for clients that block, whose steps take a while; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    server = serving(fake_backend(make_runner=lambda limits: SlowRunner(limits, step_s)), **options)
    try:
        served = run(server.__aenter__())
        try:
            yield served.server.address
        finally:
            run(server.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.asynccontextmanager
async def fails_with(code: grpc.StatusCode) -> AsyncIterator[list[grpc.aio.AioRpcError]]:
    """Asserts that a call fails so; the list that it gives holds the error in the end."""
    errors: list[grpc.aio.AioRpcError] = []
    try:
        yield errors
    except grpc.aio.AioRpcError as error:
        errors.append(error)
    assert [error.code() for error in errors] == [code], [error.details() for error in errors]


def text_of(events: Sequence[pb.GenerateResponse], index: int = 0) -> str:
    """The text of a completion."""
    return "".join(e.delta.text for e in events if e.HasField("delta") and e.delta.index == index)


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The rich details of an error, by the name of their message."""
    found: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if isinstance(value, bytes) and key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            for packed in status.details:
                for kind in _DETAILS:
                    message: ProtoMessage = kind()
                    if packed.Unpack(message):
                        found[kind.DESCRIPTOR.name] = message
    return found


def fields_of(error: grpc.aio.AioRpcError) -> list[str]:
    """The paths that the BadRequest of an error names."""
    return [v.field for v in details_of(error)["BadRequest"].field_violations]
