"""Loads: so many streams that each wait for their answers, or requests that come when they come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Protocol

from benchmarks.serving.answers import Answer, Ending

Prompt = Sequence[int]  # token ids


class ShedError(Exception):
    """The server refuses a request, for it has too many."""


class Client(Protocol):
    """Who sends requests to a server."""

    def generate(self, prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int]]:
        """The ids of the tokens that came, each time that some did. Raises ShedError."""
        ...


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests come that know nothing of each other: so many a second, for so long. The same for one seed."""
    source = random.Random(seed)
    gaps = iter(lambda: source.expovariate(rate), None)
    return list(itertools.takewhile(lambda t: t < seconds, itertools.accumulate(gaps)))


async def closed_loop(
    client: Client, streams: int, prompts: Sequence[Prompt], max_tokens: int
) -> list[Answer]:
    """Answers to the prompts, in their order, of streams that each send the next one when their last one is answered."""
    start = time.monotonic()
    left = iter(enumerate(prompts))
    answers: dict[int, Answer] = {}

    async def stream() -> None:
        for number, prompt in left:
            answers[number] = await _ask(client, prompt, max_tokens, start, time.monotonic() - start)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return [answers[number] for number in range(len(prompts))]


async def open_loop(
    client: Client,
    arrivals: Sequence[float],
    prompts: Iterator[Prompt],
    max_tokens: int,
    until_s: float,
    told: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answers of requests that are sent at their times, whatever became of those before.

    Args:
        client: sends them.
        arrivals: when, in seconds since now.
        prompts: at least as many.
        max_tokens: of each answer.
        until_s: what is unfinished then is cancelled.
        told: gets how many were answered, each time that one was.
    """
    start = time.monotonic()
    answers: list[Answer] = []

    async def one(due: float, prompt: Prompt) -> None:
        await asyncio.sleep(start + due - time.monotonic())
        answers.append(await _ask(client, prompt, max_tokens, start, due, until_s))
        told(len(answers))

    await asyncio.gather(*(one(due, prompt) for due, prompt in zip(arrivals, prompts, strict=False)))
    return answers


async def _ask(
    client: Client, prompt: Prompt, max_tokens: int, start: float, due: float, until_s: float | None = None
) -> Answer:
    """What comes of one request; `start` is the beginning of the load on the clock."""
    times: list[float] = []
    tokens: list[int] = []
    ending = Ending.WHOLE
    try:
        async with asyncio.timeout_at(None if until_s is None else _on_loop(start + until_s)):
            async with contextlib.aclosing(client.generate(prompt, max_tokens)) as events:
                async for new in events:
                    times += [time.monotonic() - start] * len(new)
                    tokens += new
        if len(times) != max_tokens:
            ending = Ending.FAILED
    except ShedError:
        ending = Ending.SHED
    except TimeoutError:
        ending = Ending.UNFINISHED
    except (OSError, RuntimeError):
        ending = Ending.FAILED
    return Answer(due, tuple(times), ending, time.monotonic() - start, tuple(tokens))


def _on_loop(moment: float) -> float:
    """A moment of `time.monotonic` on the loop's clock."""
    return asyncio.get_running_loop().time() + moment - time.monotonic()
