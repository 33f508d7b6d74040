"""Threads: who waits, for how long, and what is left of those who went."""

import asyncio
import contextlib
import threading
import time

import pytest

from pippin.serve.busy_threads import any_busy
from pippin.serve.encoding_threads import EncodingThreads
from pippin.serve.errors import QueueFullError


@contextlib.asynccontextmanager
async def made(num_threads=1, max_waiting=64):
    """Threads, and an event for which the function `hold` waits in one."""
    threads, held = EncodingThreads(num_threads, max_waiting), threading.Event()
    try:
        yield threads, held
    finally:
        held.set()
        await asyncio.sleep(0.01)
        threads.close()


async def started(*runs):
    tasks = [asyncio.ensure_future(run) for run in runs]
    await asyncio.sleep(0.01)
    return tasks


async def test_the_result_and_the_error_are_those_of_the_function():
    async with made() as (threads, _):
        assert await threads.run("", len, "abc") == 3
        with pytest.raises(ValueError, match="abc"):
            await threads.run("", int, "abc")
        assert await threads.run("", len, "abcd") == 4


async def test_tenants_take_turns():
    done = []
    async with made() as (threads, held):
        first = await started(threads.run("a", lambda _: held.wait(), None))
        tasks = await started(*(threads.run(t, done.append, t) for t in "aaabbc"))
        held.set()
        await asyncio.gather(*first, *tasks)
    assert "".join(done) == "abcaba"


async def test_who_fills_the_places_leaves_one_for_others():
    async with made(max_waiting=4) as (threads, held):
        tasks = await started(*(threads.run("a", lambda _: held.wait(), None) for _ in range(4)))
        with pytest.raises(QueueFullError, match="4 texts wait"):
            await threads.run("a", len, "")
        tasks += await started(threads.run("b", len, "abc"))
        held.set()
        assert (await asyncio.gather(*tasks))[-1] == 3


async def test_those_who_go_leave_nothing_behind_but_what_runs():
    async with made(num_threads=2) as (threads, held):
        for _ in range(100):
            for task in await started(*(threads.run("a", lambda _: held.wait(), None) for _ in range(3))):
                task.cancel()
        await asyncio.sleep(0.01)
        # Two still run, and hold the threads; of the others nothing is kept.
        assert threads._threads._work_queue.qsize() == 0 and not threads._turns and not threads._num_of
        (waits,) = await started(threads.run("b", len, "abc"))
        assert not waits.done()
        held.set()
        assert await waits == 3


async def test_closing_waits_for_nothing():
    threads, held = EncodingThreads(1, 64), threading.Event()
    (task,) = await started(threads.run("a", lambda _: held.wait(20), None))
    task.cancel()
    start = time.monotonic()
    threads.close()
    assert time.monotonic() - start < 1 and any_busy()
    held.set()
    while any_busy():
        await asyncio.sleep(0.001)


async def test_a_turn_that_comes_when_its_tenant_has_gone_is_the_next_ones():
    async with made() as (threads, held):
        first, *others = await started(
            threads.run("a", lambda _: held.wait(), None),
            threads.run("b", len, ""),
            threads.run("c", len, "abc"),
        )
        turn = next(iter(threads._turns["b"]))
        turn.add_done_callback(lambda _: others[0].cancel())  # before its task can take it
        held.set()
        assert await others[1] == 3 and await first
        assert others[0].cancelled() and threads._num_free == 1
