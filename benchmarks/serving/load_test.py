from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence

import pytest

from benchmarks.serving.answers import Ending
from benchmarks.serving.load import Prompt, ShedError, closed_loop, open_loop, poisson


class FakeClient:
    """Answers at once; a prompt that starts with 0 is refused, 1 breaks, 2 takes forever."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.asked: list[Prompt] = []

    async def generate(self, prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int]]:
        self.asked.append(prompt)
        if prompt[0] == 0:
            raise ShedError
        if prompt[0] == 1:
            raise RuntimeError("broken")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield [prompt[0]]
            await asyncio.sleep(3600 if prompt[0] == 2 else 0)
            yield [7] * (max_tokens - 1)
        finally:
            self.running -= 1


def test_arrivals_are_as_many_as_asked_for_and_the_same_for_one_seed() -> None:
    arrivals = poisson(5.0, 1000.0, seed=3)
    assert arrivals == poisson(5.0, 1000.0, seed=3) != poisson(5.0, 1000.0, seed=4)
    assert arrivals == sorted(arrivals) and 0 < arrivals[0] and arrivals[-1] < 1000
    assert len(arrivals) / 1000 == pytest.approx(5.0, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    # Of an exponential distribution, the deviation is the mean.
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)


def test_a_closed_loop_sends_each_prompt_once_with_so_many_at_a_time() -> None:
    client = FakeClient()
    answers = asyncio.run(closed_loop(client, 3, [[i] for i in range(10, 20)], 4))
    assert client.most == 3
    assert sorted(map(list, client.asked)) == [[i] for i in range(10, 20)]
    assert [a.tokens for a in answers] == [(i, 7, 7, 7) for i in range(10, 20)]  # in the order of the prompts
    assert all(len(a.token_s) == 4 and a.ending is Ending.WHOLE for a in answers)


def test_an_open_loop_tells_how_each_request_ended() -> None:
    client = FakeClient()
    answers = asyncio.run(open_loop(client, [0.0, 0.01, 0.02, 0.03], iter([[9], [0], [1], [2]]), 4, 0.3))
    by_time = sorted(answers, key=lambda a: a.sent_s)
    assert [a.ending for a in by_time] == [Ending.WHOLE, Ending.SHED, Ending.FAILED, Ending.UNFINISHED]
    assert [len(a.token_s) for a in by_time] == [4, 0, 0, 1]
    assert by_time[3].ended_s == pytest.approx(0.3, abs=0.2)
    assert client.running == 0  # what was cancelled, too
