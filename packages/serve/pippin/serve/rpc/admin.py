"""The service pippin.v1.Admin."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from pippin.serve.adapters import Adapters, Loaded
from pippin.serve.busy_threads import in_busy_thread
from pippin.serve.engine.engine import Engine, Load
from pippin.serve.errors import DrainingError, PreconditionError, RequestError, UnsupportedError
from pippin.serve.rpc.service import service_handler
from pippin.serve.served_model import ServedModel
from pippin.v1 import inference_pb2 as pb

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"]

# How long new weights wait for the requests that have begun, where nobody says.
_RELOAD_TIMEOUT_S = 60.0


class AdminService:
    """Looks after an engine. Errors are raised: `Guard` tells them."""

    def __init__(self, engine: Engine, model: ServedModel):
        self._engine, self._model = engine, model
        self._reloading = False

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server takes."""
        methods = {
            "ListAdapters": self.list_adapters,
            "LoadAdapter": self.load_adapter,
            "UnloadAdapter": self.unload_adapter,
            "Reload": self.reload,
            "Drain": self.drain,
            "GetLoad": self.get_load,
        }
        return service_handler(SERVICE, methods)

    async def list_adapters(self, request: pb.ListAdaptersRequest, _: object) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=map(_loaded, self._adapters().loaded()))

    async def load_adapter(self, request: pb.LoadAdapterRequest, _: object) -> pb.LoadAdapterResponse:
        # To its end, whether the caller waits or not.
        loaded = await asyncio.shield(_begun(self._adapters().load(request.name)))
        return pb.LoadAdapterResponse(adapter=_loaded(loaded))

    async def unload_adapter(self, request: pb.UnloadAdapterRequest, _: object) -> pb.UnloadAdapterResponse:
        await self._adapters().unload(request.name)
        return pb.UnloadAdapterResponse()

    async def reload(self, request: pb.ReloadRequest, _: object) -> pb.ReloadResponse:
        timeout_s = _reload_timeout_s(request)
        if self._model.read_anew is None:
            raise UnsupportedError(
                "This server cannot read its model anew (GetModel names no CAPABILITY_RELOAD). Start another, and drain this one."
            )
        if self._reloading:
            raise PreconditionError("The model is being read anew already. Wait until that is done.")
        self._reloading = True
        given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A thread that reads cannot be stopped: until it is done, no other begins, whether the caller waits or not.
        reload = _begun(self._reload(self._model.read_anew, timeout_s, given_up))
        try:
            await asyncio.shield(reload)
        except asyncio.CancelledError:
            given_up.cancel()
            raise
        return pb.ReloadResponse()

    async def _reload(
        self, read_anew: Callable[[], Callable[[], None]], timeout_s: float, given_up: asyncio.Future[None]
    ) -> None:
        adapters = self._model.adapters
        try:
            async with contextlib.nullcontext() if adapters is None else adapters.kept_out():
                await self._exchange(await in_busy_thread(read_anew), timeout_s, given_up)
            _log.info("the model that was read anew is served")
        except Exception as error:
            _log.warning("no other model is served: %s", error)
            raise
        finally:
            self._reloading = False

    async def _exchange(
        self, change: Callable[[], None], timeout_s: float, given_up: asyncio.Future[None]
    ) -> None:
        """Has the engine make the change, unless the time is over before or the caller has gone."""
        if given_up.done():
            raise PreconditionError("Nobody waits for the model that was read anew.")
        done = self._engine.exchange(change)
        del change  # it holds all weights, and an error of this function holds the function
        made = asyncio.wrap_future(done)
        await asyncio.wait([made, given_up], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not made.done() and done.cancel():
            if given_up.done():
                raise PreconditionError("Nobody waits for the model that was read anew.")
            raise PreconditionError(
                f"{self._engine.load().num_running} requests still run after {timeout_s:g} s, by the old weights. Ask again, or "
                "with a longer timeout."
            )
        await asyncio.wait([made])  # it has begun
        if made.cancelled():
            raise DrainingError("This server is about to stop.")
        made.result()

    def _adapters(self) -> Adapters:
        if self._model.adapters is None:
            raise UnsupportedError("This server has no adapters (GetModel names no CAPABILITY_ADAPTERS).")
        return self._model.adapters

    async def drain(self, request: pb.DrainRequest, _: object) -> pb.DrainResponse:
        self._engine.drain()
        load = self._engine.load()
        return pb.DrainResponse(num_running=load.num_running, num_waiting=load.num_waiting)

    async def get_load(self, request: pb.GetLoadRequest, _: object) -> pb.GetLoadResponse:
        load = self._engine.load()
        return pb.GetLoadResponse(
            state=_state(load),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            waiting_tokens=load.waiting_tokens,
            used_pages=load.used_pages,
            num_pages=load.num_pages,
            num_steps=load.steps,
        )


def _begun[T](work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that goes on where its caller has gone; then its error is nobody's."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _reload_timeout_s(request: pb.ReloadRequest) -> float:
    if not request.HasField("timeout"):
        return _RELOAD_TIMEOUT_S
    seconds = request.timeout.seconds + request.timeout.nanos * 1e-9
    if seconds <= 0 or not 0 <= request.timeout.nanos < 10**9:
        raise RequestError("timeout", "must be more than 0 s.")
    return seconds


def _loaded(loaded: Loaded) -> pb.LoadedAdapter:
    return pb.LoadedAdapter(name=loaded.adapter.name, rank=loaded.rank, num_requests=loaded.num_requests)


def _state(load: Load) -> pb.ServerState:
    if load.draining:
        return pb.SERVER_STATE_DRAINING
    return pb.SERVER_STATE_STALLED if load.stalled else pb.SERVER_STATE_READY
