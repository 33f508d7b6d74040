"""Server-sent events."""

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pippin.serve.http.disconnect import ClientGoneError, while_connected
from pippin.serve.http.problem import problem_of

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies hand on each event at once
]


class EventStream(Response):
    """Tells events as they come, then `[DONE]`.

    It begins with the first event: what fails before has a status of its own. What fails later is an event with an
    `error`, after which there is no `[DONE]`. A client that goes ends the generator before anything else is done.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any]], request_id: str):
        super().__init__()
        self._events, self._request_id = events, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(self._tell(send), receive)

    async def _tell(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            first = await anext(events)
            headers = [*_HEADERS, (b"x-request-id", self._request_id.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send(_event(first))
            try:
                async for event in events:
                    await send(_event(event))
                end = b"data: [DONE]\n\n"
            except ClientGoneError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, only this stream ends
                end = _event(problem_of(error).body())["body"]
            await send({"type": "http.response.body", "body": end, "more_body": False})


def _event(event: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(event, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
