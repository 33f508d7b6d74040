"""Bytes of HTTP/2 for clients that no library is: they reset, stop in the middle, or do not speak it."""

import contextlib
import socket
from collections.abc import Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _HEADERS, _RST_STREAM, _PING, _CONTINUATION = 4, 1, 3, 6, 9
_END_HEADERS, _END_STREAM, _ACK = 4, 1, 1
_CANCEL = 8


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    """A TCP connection to HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        yield connection


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def hello() -> bytes:
    """What a client begins with."""
    return _PREFACE + frame(_SETTINGS, 0, 0) + frame(_SETTINGS, _ACK, 0)


def headers(stream: int, path: str, *, ends: bool = True, extra: bytes = b"") -> bytes:
    """The headers of a call; `ends`: no more headers follow."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
    ]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    block = b"".join(_literal(name, value) for name, value in fields) + extra
    return frame(_HEADERS, _END_HEADERS if ends else 0, stream, block)


def reset(stream: int) -> bytes:
    """Ends a call at once."""
    return frame(_RST_STREAM, 0, stream, _CANCEL.to_bytes(4))


def ping() -> bytes:
    """Asks for an answer."""
    return frame(_PING, 0, 0, b"12345678")


def continuation(stream: int, length: int) -> bytes:
    """More headers, with no end of them."""
    return frame(_CONTINUATION, 0, stream, _literal(b"x", b"y" * length))


def message(stream: int, data: bytes) -> bytes:
    """The one message of a call."""
    return frame(0, _END_STREAM, stream, b"\0" + len(data).to_bytes(4) + data)


def is_open(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side keeps a connection for so long; what it says is read and forgotten."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    return False


def _literal(name: bytes, value: bytes) -> bytes:
    """A field that is not indexed, of HPACK."""
    return b"\0" + _text(name) + _text(value)


def _text(data: bytes) -> bytes:
    if len(data) < 127:
        return bytes([len(data)]) + data
    length, found = len(data) - 127, bytearray([127])
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    return bytes([*found, length]) + data
