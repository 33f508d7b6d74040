from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks.serving.http_events import post
from benchmarks.serving.load import ShedError

_OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _answered(*parts: bytes) -> list[dict[str, Any]]:
    """The events that a server's bytes are read as."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return [event async for event in post(port, "/x", {"a": 1})]


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_events_that_chunks_cut_apart_are_whole() -> None:
    text = b'data: {"n": 1}\n\ndata: {"n": 2}\r\n\r\ndata: [DONE]\n\n'
    cut = [_chunk(text[:9]), _chunk(text[9:31]), _chunk(text[31:]), b"0\r\n\r\n"]
    assert asyncio.run(_answered(_OK, *cut)) == [{"n": 1}, {"n": 2}]


def test_a_server_with_too_much_to_do_sheds() -> None:
    with pytest.raises(ShedError):
        asyncio.run(_answered(b"HTTP/1.1 429 Too Many Requests\r\n\r\n"))


def test_another_error_is_told() -> None:
    with pytest.raises(RuntimeError, match="status 400: no such"):
        asyncio.run(_answered(b"HTTP/1.1 400 Bad Request\r\n\r\nno such"))
