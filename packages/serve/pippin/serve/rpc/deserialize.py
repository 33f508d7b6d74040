"""Bytes of a caller into a message."""

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from pippin.serve.errors import InvalidRequestError, Violation


def deserialize(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """The message that a method's own deserializer reads.

    grpc.aio answers UNKNOWN, with the parser's text, where a deserializer raises: so it is called from here.

    Raises:
        InvalidRequestError: no such message, text that is not UTF-8, or nested too deep.
    """
    try:
        return parse(data)
    except (DecodeError, ValueError, RecursionError):
        raise InvalidRequestError(
            [
                Violation(
                    "",
                    "the bytes are not the message that this method takes: they are damaged or of another "
                    "type, hold text that is not UTF-8, or are nested more than 100 deep",
                )
            ]
        ) from None
