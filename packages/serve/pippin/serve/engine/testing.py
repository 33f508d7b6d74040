"""A runner and tokens for tests of what surrounds a model: no arrays are computed, and every answer is known."""

import hashlib
import queue
import threading
from collections.abc import Sequence

import numpy as np

from pippin.serve.engine.engine import Engine
from pippin.serve.engine.request import FinishReason, Output, Request, Sampled, Sums
from pippin.serve.engine.scheduler import Limits, Row

VOCAB_SIZE = 256  # a token is a byte


def token_bytes(token: int) -> bytes:
    """The bytes of a token."""
    return bytes([token])


def answer(prompt: Sequence[int], count: int, seed: int = 0, letters: int = 26) -> list[int]:
    """What the FakeRunner continues a prompt with: letters, of the first ones of the alphabet."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_next(tokens, seed, letters))
    return tokens[len(prompt) :]


def hidden(token: int) -> np.ndarray:
    """What the FakeRunner takes for the hidden state of a token."""
    return np.array([1.0, token, token % 7], np.float32)


def serve_all(engine: Engine, requests: Sequence[Request], timeout_s: float) -> dict[str, list[Sampled]]:
    """What each request was told of its tokens. All are submitted, and then the engine is started; it is stopped at the end.

    `timeout_s`: for which nothing may come.
    """
    outputs: queue.Queue[Output] = queue.Queue()
    for request in requests:
        engine.submit(request, outputs.put)
    engine.start()
    found: dict[str, list[Sampled]] = {request.request_id: [] for request in requests}
    missing = len(requests)
    while missing:
        output = outputs.get(timeout=timeout_s)
        found[output.request_id] += output.tokens
        missing -= output.finish_reason is not None
        assert output.finish_reason in (None, FinishReason.LENGTH)
    engine.stop(0)
    return found


class FakeRunner:
    """Continues each text by a letter that depends on all of it, and checks that pages hold what they should.

    With an adapter, letters are capital ones. Set `hold` to make steps wait, and put the ids of requests into `broken` to make their steps fail.
    """

    def __init__(self, limits: Limits, letters: int = 26):
        self.limits, self.letters = limits, letters
        self.steps: list[list[Row]] = []
        self.broken: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.reset()

    def reset(self) -> None:
        empty = (-1, -1)  # the token, and the adapter with which it was computed
        self._pages = [[empty] * self.limits.page_size for _ in range(self.limits.num_pages)]

    def run(self, rows: Sequence[Row]) -> list[list[Sampled] | Sums]:
        """See `Runner`."""
        self.hold.wait()
        self.steps.append(list(rows))
        if broken := self.broken & {row.request_id for row in rows}:
            raise RuntimeError(f"the step of {broken} fails")
        for row in rows:
            for i, token in enumerate(row.tokens, row.position):
                page = self._pages[row.pages[i // self.limits.page_size]]
                page[i % self.limits.page_size] = token, row.adapter_slot
        return [self._sample(row) for row in rows]

    def _sample(self, row: Row) -> list[Sampled] | Sums:
        held = [token for page in row.pages for token in self._pages[page]]
        text, end = [*row.history, *row.drafts], row.position + len(row.tokens)
        assert held[:end] == [(token, row.adapter_slot) for token in text[:end]], (
            f"the pages of {row.request_id} hold another text"
        )
        if row.sums:
            return Sums([hidden(token) for token in row.tokens])
        if row.sampling is None:
            return []
        return [
            Sampled(
                _next(row.after(n).history, row.sampling.seed, self.letters) - 32 * (row.adapter_slot > 0)
            )
            for n in range(len(row.drafts) + 1)
        ]


def _next(tokens: Sequence[int], seed: int, letters: int) -> int:
    digest = hashlib.blake2b(f"{seed} {list(tokens)}".encode(), digest_size=2).digest()
    return ord("a") + int.from_bytes(digest) % letters
