"""Threads for what takes long before the engine has a request: texts into tokens, grammars into constraints."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any

from pippin.serve.busy_threads import NAME
from pippin.serve.errors import QueueFullError

_RETRY_S = 1.0


class EncodingThreads:
    """Runs functions in a few threads, for each tenant in turn. Its methods are for one event loop.

    Only what somebody still waits for waits for a thread: who goes takes their place with them, however many come and
    go. Where others fill all places, a tenant with less than its share of them still gets one.
    """

    def __init__(self, num_threads: int, max_waiting: int):
        """`max_waiting`: what waits or runs, of those who have not gone."""
        self._threads = concurrent.futures.ThreadPoolExecutor(
            num_threads, thread_name_prefix=f"{NAME} encoding"
        )
        self._num_free, self._max_waiting = num_threads, max_waiting
        self._num_of: dict[str, int] = {}  # tenant -> what waits or runs
        # tenant -> its turns, in their order (to None); the first tenant is the next
        self._turns: dict[str, dict[asyncio.Future[None], None]] = {}

    async def run[T](self, tenant: str, function: Callable[[Any], T], argument: Any) -> T:
        """What the function returns, or raises.

        Raises:
            QueueFullError: too much waits.
        """
        total, own = sum(self._num_of.values()), self._num_of.get(tenant, 0)
        if total >= self._max_waiting and own >= self._max_waiting // (len(self._num_of) + 1):
            raise QueueFullError(
                f"{total} texts wait to be tokenized. Try again in {_RETRY_S:g} s.", _RETRY_S
            )
        self._num_of[tenant] = own + 1
        try:
            await self._turn(tenant)
            loop, running = asyncio.get_running_loop(), self._threads.submit(function, argument)

            def give_back(_: object) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._next)

            # Also where nobody waits for it any more: the thread is busy until then.
            running.add_done_callback(give_back)
            return await asyncio.wrap_future(running)
        finally:
            self._num_of[tenant] -= 1
            if not self._num_of[tenant]:
                del self._num_of[tenant]

    def close(self) -> None:
        """Ends the threads, each behind what it does, which nobody may wait for; does not wait itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, tenant: str) -> None:
        """Waits for a thread."""
        if self._num_free:
            self._num_free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.setdefault(tenant, {})[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came, and nobody is there to take it
                self._next()
            elif (turns := self._turns.get(tenant)) is not None:
                turns.pop(turn, None)
                if not turns:
                    del self._turns[tenant]
            raise

    def _next(self) -> None:
        """Gives a thread that is free to the first turn of the tenant whose turn it is."""
        if not self._turns:
            self._num_free += 1
            return
        tenant = next(iter(self._turns))
        turns = self._turns.pop(tenant)
        turn = next(iter(turns))
        del turns[turn]
        if turns:
            self._turns[tenant] = turns  # behind the others
        if turn.cancelled():
            self._next()
        else:
            turn.set_result(None)
