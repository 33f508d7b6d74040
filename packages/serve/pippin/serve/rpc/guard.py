"""What surrounds every method of every service: who calls, what arrived, a slow reader, and how it ends."""

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.rpc import status_pb2

from pippin.serve.callers import Caller
from pippin.serve.errors import let_go
from pippin.serve.frontend import take
from pippin.serve.rpc.auth import Authenticator, DeniedError
from pippin.serve.rpc.deserialize import deserialize
from pippin.serve.rpc.status import abort_with, denied, status_of

_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that is being answered."""
    return _caller.get()


class Guard(grpc.aio.ServerInterceptor):
    """Wraps each method, those of health and reflection too.

    The caller is known before their bytes are read. An error ends its own call, and says nothing of the server.
    """

    def __init__(self, authenticator: Authenticator, slow_reader_timeout_s: float):
        self._authenticator, self._slow_reader_timeout_s = authenticator, slow_reader_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # there is no such method: grpc answers
            return None
        method = handler_call_details.method
        serializer = handler.response_serializer
        if handler.unary_unary:
            call = self._unary(handler.unary_unary, handler.request_deserializer, method)
            return grpc.unary_unary_rpc_method_handler(call, None, serializer)
        if handler.unary_stream:
            call = self._stream(handler.unary_stream, handler.request_deserializer, method, _one)
            return grpc.unary_stream_rpc_method_handler(call, None, serializer)
        assert handler.stream_stream, f"no service here has a method such as {method}"
        call = self._stream(handler.stream_stream, handler.request_deserializer, method, _each)
        return grpc.stream_stream_rpc_method_handler(call, None, serializer)

    def _unary(self, inner: Any, parse: Any, method: str) -> Any:
        async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                self._admit(context, method)
                return await inner(deserialize(parse, data), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, only this call ends
                status = _status(error)
                let_go(error)
            # Out of the handler, and without the bytes: what `abort` raises holds this frame (see `let_go`).
            del data
            await abort_with(context, status)

        return call

    def _stream(self, inner: Any, parse: Any, method: str, read: Any) -> Any:
        async def call(data: Any, context: grpc.aio.ServicerContext) -> None:
            try:
                self._admit(context, method)
                async with contextlib.aclosing(inner(read(parse, data), context)) as responses:
                    async for response in responses:
                        await take(context.write(response), self._slow_reader_timeout_s)
                return
            except grpc.aio.AbortError:
                raise
            except grpc.aio.InternalError:  # of a write
                raise asyncio.CancelledError("the client has gone") from None
            except Exception as error:  # noqa: BLE001 - as above
                status = _status(error)
                let_go(error)
            del data
            await abort_with(context, status)

        return call

    def _admit(self, context: grpc.aio.ServicerContext, method: str) -> None:
        _caller.set(self._authenticator.authenticate(method, context))


def _status(error: Exception) -> status_pb2.Status:
    if isinstance(error, DeniedError):
        return denied(error.code, error.reason, str(error))
    return status_of(error)


def _one(parse: Any, data: bytes) -> Any:
    return deserialize(parse, data)


async def _each(parse: Any, stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in stream:
        yield deserialize(parse, data)
