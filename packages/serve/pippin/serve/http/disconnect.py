"""Work that ends when its client goes."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


async def while_connected[T](work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What the work gives; the body of the request must have been read.

    Raises:
        ClientGoneError: the client went first. The work was cancelled, and has ended.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
