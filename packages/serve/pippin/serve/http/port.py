"""An HTTP server on its address, with every bound set."""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pippin.core.errors import ConfigError
from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.tls_files import TlsFiles, read_context
from pippin.serve.watched_file import WatchedFiles

_BACKLOG = 1024


class HttpPort:
    """A server that runs."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], address: str):
        self._server, self._task, self.address = server, task, address

    @property
    def num_connections(self) -> int:
        """That are open."""
        return len(self._server.server_state.connections)

    async def stop(self) -> None:
        """Takes no more connections, and ends when what is being told is told, or after the time for that."""
        self._server.should_exit = True
        await self._task


async def open_port(
    app: ASGIApp, address: str, tls: TlsFiles | None, flush_s: float, limits: HttpLimits
) -> HttpPort:
    """A server that answers at HOST:PORT; `flush_s`: how long its last words may take.

    Raises:
        ConfigError: the address is taken, or a file of `tls` is wrong.
    """
    context = None if tls is None else _context(tls)
    config = uvicorn.Config(
        app,
        http=functools.partial(_Protocol, limits),  # pyright: ignore[reportArgumentType] - what makes one
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ssl_context_factory=None if context is None else lambda *_: context,
        limit_concurrency=limits.max_connections + 1,  # it refuses the one that reaches it
        timeout_keep_alive=limits.keepalive_s,
        timeout_graceful_shutdown=int(flush_s),
        h11_max_incomplete_event_size=limits.max_header_bytes,
    )
    listener = _listen(address, limits)
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
        if task.done():
            task.result()
    host = address.rpartition(":")[0]
    return HttpPort(server, task, f"{host}:{listener.getsockname()[1]}")


class _Server(uvicorn.Server):
    """Leaves signals to who started it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """A connection that is cut where headers do not come in time.

    Requests have `state.certificate_names`, a function, and `state.abort`, which cuts it at once.
    """

    def __init__(self, limits: HttpLimits, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._header_timeout_s = limits.header_timeout_s
        self._cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        names = functools.partial(_certificate_names, transport)
        self.app_state = {**self.app_state, "certificate_names": names, "abort": transport.abort}
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._cut is not None:
            self._cut.cancel()

    def _watch_headers(self) -> None:
        waits = self.conn.their_state is h11.IDLE
        if waits and self._cut is None:
            self._cut = self.loop.call_later(self._header_timeout_s, self.transport.abort)
        elif not waits and self._cut is not None:
            self._cut.cancel()
            self._cut = None


def _listen(address: str, limits: HttpLimits) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, ValueError):
        raise ConfigError(f"{address} is no address of this machine. Choose another address.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Both are handed on to the connections: who is gone without a word, and who takes nothing.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux
            listener.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.write_timeout_s * 1000)
            )
            # A client that waits for a whole answer is sent nothing: the system asks whether it is there.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.tcp_keepalive_s)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.tcp_keepalive_s)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise ConfigError(f"{address} could not be opened. Choose another address.") from None
    listener.setblocking(False)
    return listener


def _context(files: TlsFiles) -> ssl.SSLContext:
    """Connections made after the files changed get the new certificate."""
    watched = WatchedFiles(files.paths, read_context)
    context = watched.value

    def newest(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = watched.value

    context.sni_callback = newest
    return context


def _certificate_names(transport: asyncio.BaseTransport) -> Sequence[str]:
    """The names in the certificate of the other side: its common name, then the others."""
    certificate = transport.get_extra_info("peercert") or {}
    common = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return [*common, *(value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")]
