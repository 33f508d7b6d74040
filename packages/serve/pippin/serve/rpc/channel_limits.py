"""Bounds of gRPC's connections and messages."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelLimits:
    """Bounds of connections and messages."""

    max_message_bytes: int = 4 << 20  # a prompt is text: a batch of long ones fits
    max_header_bytes: int = 16 << 10  # room for tokens and traces
    max_streams: int = 256  # of one connection: a client cannot open and reset them without end
    max_connections: int = 1024  # beyond, they are closed at once: each takes a file of this process
    handshake_s: float = 10.0  # for TLS and the first frame, after which a silent connection is closed
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
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_s * 1000)),
            ("grpc.max_connection_age_ms", int(self.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(self.max_connection_age_grace_s * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            # Without it the answer to a ping is waited for a minute, whatever the line above says.
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_s * 1000)),
            # gRPC's own default ends the connection of a client that pings every 10 s.
            ("grpc.http2.max_ping_strikes", 10),
            ("grpc.keepalive_permit_without_calls", 1),
            # Two servers on one port would share its connections without a word.
            ("grpc.so_reuseport", 0),
        ]
