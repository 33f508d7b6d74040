"""The service grpc.health.v1.Health."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from pippin.serve.engine.engine import Engine
from pippin.serve.errors import NotFoundError
from pippin.serve.rpc.service import service_handler

SERVICE: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]

# The stubs of the distribution do not know the messages of List.
_ListResponse = GetMessageClass(SERVICE.methods_by_name["List"].output_type)
_POLL_S = 0.2  # how soon a watcher sees a change
_Status = health_pb2.HealthCheckResponse.ServingStatus
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class HealthService:
    """Tells whether the engine serves: it makes progress where it has work, and takes more.

    Services that look after the server serve also while it does not.
    """

    def __init__(self, engine: Engine, inference: Sequence[str], others: Sequence[str] = ()):
        """`inference`: the services that need the engine; "" is the server as a whole."""
        self._engine, self._inference, self._others = engine, ("", *inference), tuple(others)
        self._withdrawn = self._closed = False

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server takes."""
        return service_handler(SERVICE, {"Check": self.check, "List": self.list, "Watch": self.watch})

    def withdraw(self) -> None:
        """NOT_SERVING from now on, while the engine still takes requests: so that traffic goes elsewhere first."""
        self._withdrawn = True

    def close(self) -> None:
        """Ends the streams of those who watch."""
        self._closed = True

    def status(self, service: str) -> _Status | None:
        """Of a service; None: there is none of that name."""
        if service in self._others:
            return _SERVING
        if service not in self._inference:
            return None
        load = self._engine.load()
        return _NOT_SERVING if self._withdrawn or load.draining or load.stalled else _SERVING

    def is_serving(self) -> bool:
        """The server as a whole."""
        return self.status("") == _SERVING

    async def check(
        self, request: health_pb2.HealthCheckRequest, _: object
    ) -> health_pb2.HealthCheckResponse:
        status = self.status(request.service)
        if status is None:
            raise NotFoundError("There is no service of this name.")
        return health_pb2.HealthCheckResponse(status=status)

    async def list(self, request: Message, _: object) -> Message:
        statuses = {name: self.status(name) for name in (*self._inference, *self._others)}
        return _ListResponse(
            statuses={
                name: health_pb2.HealthCheckResponse(status=status) for name, status in statuses.items()
            }
        )

    async def watch(
        self, request: health_pb2.HealthCheckRequest, _: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while not self._closed:
            status = self.status(request.service)
            now = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN if status is None else status
            if now != told:
                told = now
                yield health_pb2.HealthCheckResponse(status=now)
            await asyncio.sleep(_POLL_S)
