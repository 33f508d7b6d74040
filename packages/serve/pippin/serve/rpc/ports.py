"""gRPC servers on their addresses, with every bound set."""

import os
import pathlib
import socket
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from pippin.core.errors import ConfigError
from pippin.serve.addresses import require_free
from pippin.serve.rpc.channel_limits import ChannelLimits
from pippin.serve.rpc.guard import Guard

_LIMITS = ChannelLimits()


def open_port(
    address: str,
    handlers: Sequence[grpc.GenericRpcHandler],
    guard: Guard,
    *,
    credentials: grpc.ServerCredentials | None = None,
    limits: ChannelLimits = _LIMITS,
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
    if path == pathlib.Path():
        raise ConfigError(f"{address} names no file. Give unix:PATH.")
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
