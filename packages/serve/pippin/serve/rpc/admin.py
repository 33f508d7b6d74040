"""The service pippin.v1.Admin."""

from typing import NoReturn

import grpc

from pippin.serve.engine.engine import Engine, Load
from pippin.serve.errors import UnsupportedError
from pippin.serve.rpc.service import service_handler
from pippin.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"]


class AdminService:
    """Looks after an engine. Errors are raised: `Guard` tells them."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server takes."""
        methods = {
            "ListAdapters": self.no_adapters,
            "LoadAdapter": self.no_adapters,
            "UnloadAdapter": self.no_adapters,
            "Reload": self.reload,
            "Drain": self.drain,
            "GetLoad": self.get_load,
        }
        return service_handler(SERVICE, methods)

    async def no_adapters(self, request: object, _: object) -> NoReturn:
        raise UnsupportedError("This server has no adapters (GetModel names no CAPABILITY_ADAPTERS).")

    async def reload(self, request: pb.ReloadRequest, _: object) -> NoReturn:
        raise UnsupportedError(
            "This server cannot read its model anew (GetModel names no CAPABILITY_RELOAD). Start another, and drain this one."
        )

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


def _state(load: Load) -> pb.ServerState:
    if load.draining:
        return pb.SERVER_STATE_DRAINING
    return pb.SERVER_STATE_STALLED if load.stalled else pb.SERVER_STATE_READY
