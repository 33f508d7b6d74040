"""The service pippin.v1.Admin."""

import asyncio
from typing import NoReturn

import grpc

from pippin.serve.adapters import Adapters, Loaded
from pippin.serve.engine.engine import Engine, Load
from pippin.serve.errors import UnsupportedError
from pippin.serve.rpc.service import service_handler
from pippin.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"]


class AdminService:
    """Looks after an engine. Errors are raised: `Guard` tells them."""

    def __init__(self, engine: Engine, adapters: Adapters | None):
        self._engine, self._registered = engine, adapters

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

    async def reload(self, request: pb.ReloadRequest, _: object) -> NoReturn:
        raise UnsupportedError(
            "This server cannot read its model anew (GetModel names no CAPABILITY_RELOAD). Start another, and drain this one."
        )

    def _adapters(self) -> Adapters:
        if self._registered is None:
            raise UnsupportedError("This server has no adapters (GetModel names no CAPABILITY_ADAPTERS).")
        return self._registered

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
