"""The service pippin.v1.Admin."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc

from pippin.serve.adapters import Adapters, Loaded
from pippin.serve.engine.engine import Engine, Load
from pippin.serve.errors import PreconditionError, UnsupportedError
from pippin.serve.rpc.service import service_handler
from pippin.serve.served_model import ServedModel
from pippin.v1 import inference_pb2 as pb

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"]


class AdminService:
    """Looks after an engine. Errors are raised: `Guard` tells them."""

    def __init__(self, engine: Engine, model: ServedModel):
        self._engine, self._model = engine, model
        self._reloading: asyncio.Task[None] | None = None

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
        loaded = await asyncio.shield(self._adapters().load(request.name))
        return pb.LoadAdapterResponse(adapter=_loaded(loaded))

    async def unload_adapter(self, request: pb.UnloadAdapterRequest, _: object) -> pb.UnloadAdapterResponse:
        await self._adapters().unload(request.name)
        return pb.UnloadAdapterResponse()

    async def reload(self, request: pb.ReloadRequest, _: object) -> pb.ReloadResponse:
        if self._model.read_anew is None:
            raise UnsupportedError(
                "This server cannot read its model anew (GetModel names no CAPABILITY_RELOAD). Start another, and drain this one."
            )
        if self._reloading is not None and not self._reloading.done():
            raise PreconditionError("The model is being read anew already. Wait until that is done.")
        # To its end, whether the caller waits or not.
        self._reloading = asyncio.create_task(self._reload(self._model.read_anew))
        await asyncio.shield(self._reloading)
        return pb.ReloadResponse()

    async def _reload(self, read_anew: Callable[[], Callable[[], None]]) -> None:
        adapters = self._model.adapters
        async with contextlib.nullcontext() if adapters is None else adapters.kept_out():
            change = await asyncio.to_thread(read_anew)
            await asyncio.wrap_future(self._engine.exchange(change))
        _log.info("the model that was read anew is served")

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


def _loaded(loaded: Loaded) -> pb.LoadedAdapter:
    return pb.LoadedAdapter(name=loaded.adapter.name, rank=loaded.rank, num_requests=loaded.num_requests)


def _state(load: Load) -> pb.ServerState:
    if load.draining:
        return pb.SERVER_STATE_DRAINING
    return pb.SERVER_STATE_STALLED if load.stalled else pb.SERVER_STATE_READY
