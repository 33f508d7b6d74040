"""Threads for what nothing can stop."""

import asyncio
import threading
import time

import pytest

from pippin.serve.busy_threads import any_busy, in_busy_thread


async def test_the_result_and_the_error_are_those_of_the_function():
    assert await in_busy_thread(max, 2, 3) == 3
    with pytest.raises(ValueError, match="abc"):
        await in_busy_thread(int, "abc")


async def test_who_waits_may_go_and_it_is_known_that_it_goes_on():
    held = threading.Event()
    waits = asyncio.ensure_future(in_busy_thread(held.wait, 20))
    await asyncio.sleep(0.01)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert any_busy()
    held.set()
    until = time.monotonic() + 20
    while any_busy():
        assert time.monotonic() < until
        await asyncio.sleep(0.001)


def test_the_end_of_an_event_loop_does_not_wait():
    held = threading.Event()

    async def serve() -> None:
        task = asyncio.ensure_future(in_busy_thread(held.wait, 20))
        await asyncio.sleep(0.01)
        assert not task.done()

    start = time.monotonic()
    asyncio.run(serve())
    assert time.monotonic() - start < 10
    held.set()
