"""Server-sent events over HTTP/1.1, read with as little work as can be: a client's work takes time from the server's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from benchmarks.serving.load import ShedError

_REFUSED = (429, 503)


async def post(port: int, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """The events that a server of this machine answers a body of JSON with.

    Raises:
        ShedError: the server has too much to do.
        RuntimeError: it answers another error.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(headers.split(maxsplit=2)[1])
        if status in _REFUSED:
            raise ShedError
        if status != 200:
            raise RuntimeError(f"status {status}: {(await reader.read(2000)).decode(errors='replace')}")
        chunks = _chunks(reader) if "transfer-encoding: chunked" in headers else _all(reader)
        held = b""
        async for chunk in chunks:
            *events, held = (held + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data:").strip()
                if event.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _all(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(1 << 16):
        yield part
