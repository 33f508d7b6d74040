"""Bounds of connections and bodies."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """What a client may take of the server before a request is understood."""

    max_body_bytes: int = 4 << 20  # as gRPC's messages
    max_depth: int = 64  # of arrays and objects in each other
    body_timeout_s: float = 30.0  # for all of a body
    max_header_bytes: int = 16 << 10
    header_timeout_s: float = 10.0  # for all headers of a request
    keepalive_s: int = 75  # for the next request; longer than clients keep a connection
    max_connections: int = 1024  # beyond, 503
    # A connection whose other side takes nothing for so long is cut by the system, whatever is left to send.
    write_timeout_s: float = 60.0
    tcp_keepalive_s: int = 30  # between the system's questions to a silent client whether it is still there
