"""Addresses that a server listens on: HOST:PORT, or unix:PATH."""

import errno
import ipaddress
import socket

from pippin.core.errors import ConfigError


def is_local(address: str) -> bool:
    """Only this machine reaches the address."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_free(address: str) -> None:
    """Says why an address cannot be had, which gRPC does not.

    Raises:
        ConfigError: it is taken, or is none of this machine.
    """
    if address.startswith("unix:"):
        return
    host, _, port = address.rpartition(":")
    try:
        if not host:
            raise ValueError("it must be HOST:PORT")
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (OSError, ValueError, OverflowError) as error:
        reasons = {errno.EADDRINUSE: "another process has it", errno.EACCES: "this user may not have it"}
        reason = reasons.get(getattr(error, "errno", None) or 0, "it is no address of this machine")
        raise ConfigError(f"{address} cannot be listened on: {reason}. Choose another address.") from None
