"""Connections whose other side is gone without a word, or never said one, with the bounds that see it made short."""

import asyncio
import contextlib
import socket

import grpc
import grpc.aio

from pippin.serve.rpc.channel_limits import ChannelLimits
from pippin.serve.testing import Served, SlowRunner, fake_backend, serving
from pippin.v1 import inference_pb2 as pb
from tests.robustness import wire

_SHORT = ChannelLimits(keepalive_s=0.5, keepalive_timeout_s=0.5, handshake_s=1.0, max_connections=20)


class Cable:
    """Between a client and a server, until it is pulled out: then nothing goes through, and nobody is told."""

    def __init__(self, address: str):
        self._address, self._pulled = address, asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def plug(self) -> str:
        """The address of its near end."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def pull(self) -> None:
        self._pulled.set()

    async def close(self) -> None:
        assert self._server is not None
        for writer in self._writers:
            writer.transport.abort()
        self._server.close()
        await asyncio.sleep(0.05)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._address.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        self._writers += [writer, far_writer]
        await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not self._pulled.is_set():
                    writer.write(data)


async def is_free(served: Served) -> None:
    async with asyncio.timeout(10):
        while (load := served.engine.load()).num_running or load.num_waiting or load.used_pages:
            await asyncio.sleep(0.01)


async def test_a_client_behind_a_cable_that_was_pulled_out_holds_nothing_for_long():
    tasks = len(asyncio.all_tasks())
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.05))
    async with serving(fake, channel_limits=_SHORT) as served:
        cable = Cable(served.server.address)
        async with grpc.aio.insecure_channel(await cable.plug()) as channel:
            call = served.method("Generate", channel)(pb.GenerateRequest(text="hello", max_tokens=500))
            await call.read()
            await call.read()
            cable.pull()
            try:
                await is_free(served)
                assert served.engine.load().generated < 200, "and not because it was done"
                assert [
                    e async for e in served.method("Generate")(pb.GenerateRequest(text="a", max_tokens=2))
                ]
            finally:
                await cable.close()
    await asyncio.sleep(0.1)
    assert len(asyncio.all_tasks()) <= tasks


async def test_connections_that_never_say_a_word_are_closed_and_bounded_in_number():
    async with serving(channel_limits=_SHORT) as served:
        loop, host, port = asyncio.get_running_loop(), *served.server.address.split(":")
        silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(60)]
        still_open = await asyncio.gather(
            *(loop.run_in_executor(None, wire.is_open, s, 6.0) for s in silent[::6])
        )
        assert not any(still_open)
        for connection in silent:
            connection.close()
        assert [e async for e in served.method("Generate")(pb.GenerateRequest(text="a", max_tokens=2))]


async def test_the_system_asks_silent_clients_of_http_whether_they_are_there():
    async with serving(http_port=0) as served:
        assert served.server.http is not None
        (listener,) = served.server.http._server.servers[0].sockets
        with listener.dup() as found:
            idle_s = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle_s == 30
