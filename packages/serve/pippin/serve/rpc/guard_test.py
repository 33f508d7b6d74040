import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2

from pippin.serve.callers import Caller, Identities
from pippin.serve.rpc.auth import Authenticator, DeniedError
from pippin.serve.rpc.guard import Guard, current_caller
from pippin.serve.rpc.ports import open_port
from pippin.serve.testing import details_of

CHUNK = bytes(64 << 10)


class Streams:
    """A service whose one method tells more than any connection holds."""

    def __init__(self):
        self.ended = asyncio.Event()
        self.told = 0

    def handler(self):
        method = grpc.unary_stream_rpc_method_handler(self.tell, request_deserializer=bytes)
        return grpc.method_handlers_generic_handler("test.Streams", {"Tell": method})

    async def tell(self, request, context):
        try:
            while self.told < 4000:
                self.told += 1
                yield CHUNK
        finally:
            self.ended.set()


class Stranger(Authenticator):
    """Knows only who sends their name."""

    def __init__(self):
        super().__init__(None)

    def authenticate(self, method, context):
        names = dict(context.invocation_metadata())
        if "name" not in names:
            raise DeniedError(code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED", "Who are you?")
        return Caller(names["name"], frozenset())


async def open_streams(authenticator, slow_reader_timeout_s=0.3):
    streams = Streams()
    guard = Guard(authenticator, slow_reader_timeout_s)
    server, address = open_port("127.0.0.1:0", [streams.handler()], guard)
    await server.start()
    return streams, server, address


async def test_a_stream_that_nobody_reads_ends():
    streams, server, address = await open_streams(Authenticator(Identities(None)))
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream("/test.Streams/Tell")(b"")
        await call.read()
        async with asyncio.timeout(10):
            await streams.ended.wait()
        assert streams.told < 1000
        read = []
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while await call.read() is not grpc.aio.EOF:
                read.append(1)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(error.value)["ErrorInfo"].reason == "SLOW_READER"
    async with asyncio.timeout(5):
        await server.stop(0)


async def test_a_reader_who_never_reads_again_does_not_keep_the_server_from_stopping():
    streams, server, address = await open_streams(Authenticator(Identities(None)))
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream("/test.Streams/Tell")(b"")
        await call.read()
        async with asyncio.timeout(10):
            await streams.ended.wait()
            await server.stop(0.1)
        call.cancel()


async def test_who_is_not_known_does_not_get_to_the_method():
    streams, server, address = await open_streams(Stranger())
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_stream("/test.Streams/Tell")(b"").read()
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details_of(error.value)["ErrorInfo"].reason == "UNAUTHENTICATED"
    assert streams.told == 0
    await server.stop(0)


async def test_the_method_knows_its_caller():
    seen = []

    async def answer(request, context):
        await asyncio.sleep(0.01)
        seen.append((request, current_caller().tenant))
        return request

    method = grpc.unary_unary_rpc_method_handler(answer, request_deserializer=bytes)
    handler = grpc.method_handlers_generic_handler("test.Names", {"Name": method})
    server, address = open_port("127.0.0.1:0", [handler], Guard(Stranger(), 1.0))
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/test.Names/Name")
        await asyncio.gather(*(call(n.encode(), metadata=[("name", n)]) for n in ("ann", "bob")))
    assert sorted(seen) == [(b"ann", "ann"), (b"bob", "bob")]
    await server.stop(0)
