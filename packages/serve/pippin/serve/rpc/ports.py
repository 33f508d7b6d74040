"""gRPC servers on their addresses, with every bound set."""

import dataclasses
import os
import pathlib
import socket
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from pippin.core.errors import ConfigError
from pippin.serve.addresses import require_free
from pippin.serve.rpc.guard import Guard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelLimits:
    """Bounds of connections and messages."""

    max_message_bytes: int = 4 << 20  # a prompt is text: a batch of long ones fits
    max_header_bytes: int = 16 << 10  # room for tokens and traces
    max_streams: int = 256  # of one connection: a client cannot open and reset them without end
    max_calls: int = 1024  # of all connections: beyond, RESOURCE_EXHAUSTED at once
    max_connection_age_s: float = 3600.0  # then clients connect anew, perhaps to a replica that came later
    max_connection_age_grace_s: float = 3600.0  # what a stream may still take: as long as a request may
    keepalive_s: float = 60.0  # finds clients that are gone without a word, whose requests hold memory
    keepalive_timeout_s: float = 20.0
    min_ping_s: float = 10.0  # clients may ping as often, also through a long wait for the first token

    def options(self) -> list[tuple[str, Any]]:
        """As gRPC names them. Whatever is not here is gRPC's default."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_metadata_size", self.max_header_bytes),
            ("grpc.absolute_max_metadata_size", self.max_header_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.max_connection_age_ms", int(self.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(self.max_connection_age_grace_s * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_s * 1000)),
            # gRPC's own default ends the connection of a client that pings every 10 s.
            ("grpc.http2.max_ping_strikes", 10),
            ("grpc.keepalive_permit_without_calls", 1),
            # Two servers on one port would share its connections without a word.
            ("grpc.so_reuseport", 0),
        ]


def open_port(
    address: str,
    handlers: Sequence[grpc.GenericRpcHandler],
    guard: Guard,
    *,
    credentials: grpc.ServerCredentials | None = None,
    limits: ChannelLimits = ChannelLimits(),
    reflected: Sequence[str] = (),
) -> tuple[grpc.aio.Server, str]:
    """A server that is yet to be started, and its address with the port that it got.

    `reflected`: the services that reflection tells of; none: there is no reflection.

    Raises:
        ConfigError: the address is taken, or is none of this machine.
    """
    server = grpc.aio.server(
        interceptors=[guard], options=limits.options(), maximum_concurrent_rpcs=limits.max_calls
    )
    server.add_generic_rpc_handlers(tuple(handlers))
    if reflected:
        reflection.enable_server_reflection([*reflected, reflection.SERVICE_NAME], server)
    if address.startswith("unix:"):
        return server, _bind_socket(server, address)
    require_free(address)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:  # between the check and now
        raise ConfigError(f"{address} could not be opened. Choose another address.") from None
    return server, f"{address.rpartition(':')[0]}:{port}"


async def close_port(server: grpc.aio.Server) -> None:
    """Ends a server at once, also one that was not started: gRPC would keep its address."""
    await server.start()  # nothing happens where it was
    await server.stop(None)


def _bind_socket(server: grpc.aio.Server, address: str) -> str:
    """A Unix socket that only its owner may use. One that a dead server left is replaced."""
    path = pathlib.Path(address.removeprefix("unix:"))
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ConfigError(f"{address} is served by another process. Choose another address.")
        path.unlink()
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise ConfigError(
            f"{address} could not be opened. Its folder must exist and be yours to write, and its name short."
        ) from None
    finally:
        os.umask(mask)
    return address
