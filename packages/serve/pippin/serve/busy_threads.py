"""Threads for work that nothing can stop, such as reading files: the end of the process does not wait for it."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

# Of the names of such threads, those of other modules too.
NAME = "busy"


async def in_busy_thread[T](function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns, or raises; it goes on where nobody waits for it any more."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            result = function(*arguments)
        except BaseException as error:  # noqa: BLE001  who waits is told
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name=NAME, daemon=True).start()
    return await asyncio.wrap_future(done)


def any_busy() -> bool:
    """Whether Python would wait for such a thread at its end, or take its world away from under it."""
    return any(thread.name.startswith(NAME) for thread in threading.enumerate())
