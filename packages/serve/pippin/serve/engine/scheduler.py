"""Which tokens of which requests a step computes. There is no phase: any step computes prompts and answers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pippin.core.errors import ConfigError
from pippin.serve.engine.drafter import Drafter
from pippin.serve.engine.page_pool import PagePool, prefix_keys
from pippin.serve.engine.request import Constraint, Request, Sampled, Sampling, Sums
from pippin.serve.engine.waiting import WaitingQueue

# The least and the most rows of a program for answers. A matrix product on a CPU sums in another order for one row, for
# one to three, and for more than 32: the same token would differ in the last bits.
_LEAST_ANSWER_ROWS, _MOST_ANSWER_ROWS = 4, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a step and the cache hold."""

    num_pages: int
    page_size: int = 16  # tokens
    longest: int | None = None  # text that the model can read, in tokens; None: any that fits into the pages
    max_requests: int = 32  # served at a time, and tokens of answers in a step
    chunk_tokens: int = 128  # of prompts in a step
    row_tokens: int = 16  # a chunk is computed in rows of so many, the last of a prompt not full
    # Whether prompts begin with pages of answers, too. Their numbers differ in the last bits from those of a prompt, so
    # that an answer would depend on what was served before.
    reuse_answers: bool = False
    max_drafts: int = 4  # guesses of an answer's next tokens in a step; 0: none
    aging_s: float = 10.0  # who waits so long is as urgent as who came now with a priority higher by one

    def __post_init__(self) -> None:
        if self.chunk_tokens < self.row_tokens or self.chunk_tokens % self.row_tokens:
            raise ConfigError(
                f"chunk_tokens is {self.chunk_tokens}: it must be a multiple of {self.row_tokens}, and not 0."
            )

    @property
    def max_context(self) -> int:
        """The longest text, in tokens."""
        held = self.num_pages * self.page_size
        return held if self.longest is None else min(held, self.longest)

    @property
    def answer_rows(self) -> list[int]:
        """How many tokens of answers programs are made for: a step takes the time of the next larger one."""
        return doublings(_LEAST_ANSWER_ROWS, min(self.max_requests, _MOST_ANSWER_ROWS))


def doublings(first: int, most: int) -> list[int]:
    """Powers of two times the first, up to one that is no less than the most."""
    counts = [first]
    while counts[-1] < most:
        counts.append(2 * counts[-1])
    return counts


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens of one request that a step computes."""

    request_id: str
    tokens: Sequence[int]  # the last ones are drafts
    position: int  # of the first
    pages: Sequence[int]  # of the text, from its start to the last of the tokens
    sampling: Sampling | None  # how to choose the token that follows; None: there is more of the text already
    history: Sequence[int]  # prompt and output so far
    num_prompt: int  # of these are the prompt
    constraint: Constraint | None
    drafts: Sequence[int] = ()  # guesses of what follows the history
    draft_room: int = 0  # so many guesses cost nothing, for who makes them of rows
    adapter_slot: int = 0  # 0: the base model
    sums: bool = False  # whether the sum of the hidden states is wanted; then no token is

    @property
    def is_prompt(self) -> bool:
        """Whether the tokens are of a prompt. Those of an answer are always computed apart from these."""
        return self.position < self.num_prompt

    def with_drafts(self, drafts: Sequence[int]) -> "Row":
        """The row with guesses behind its tokens."""
        return dataclasses.replace(self, tokens=[*self.tokens, *drafts], drafts=drafts) if drafts else self

    def after(self, num_drafts: int) -> "Row":
        """What is asked for behind some of the drafts, taken for right."""
        return dataclasses.replace(self, history=[*self.history, *self.drafts[:num_drafts]])

    def accepted[T](self, chosen: Sequence[T], token: Callable[[T], int]) -> Sequence[T]:
        """Of what was chosen behind the history and behind each draft: as many as drafts were right, and one more.

        A token is chosen behind right drafts exactly as it would have been without: drafts change no answer.
        """
        wrong = (i for i, draft in enumerate(self.drafts) if token(chosen[i]) != draft)
        return chosen[: next(wrong, len(self.drafts)) + 1]


class Runner(Protocol):
    """Who computes: the model and its cache."""

    def run(self, rows: Sequence[Row]) -> Sequence[Sequence[Sampled] | Sums]:
        """Computes the keys and values of all rows.

        The result is what follows each row that asks for it: behind its history, and behind each of its drafts as if
        all before were right. Of a row that wants sums, it is these.
        """
        ...

    def reset(self) -> None:
        """Makes the cache anew, after a failure. What pages held is lost."""
        ...


class Generation:
    """A request on its way."""

    def __init__(self, request: Request, arrived: float, number: int, aging_s: float):
        self.request, self.arrived = request, arrived
        self.tenant = request.tenant
        self.urgency = (arrived - request.priority * aging_s, number)
        self.tokens = list(request.prompt)  # and output
        self.pages: list[int] = []
        self.keys: list[bytes] = []  # of its full pages
        self.num_computed = 0  # tokens whose keys and values are in the pages
        self.num_cached = 0  # of the prompt, that were there when it was first scheduled
        self.scheduled: float | None = None  # when it first was
        self.first_token: float | None = None  # when it came
        self.last_token = arrived  # when the newest came
        self.num_told = 0  # tokens of output that the caller was told, or that ended it
        self.sums: np.ndarray | None = None  # [D], of the hidden states of the tokens that were computed
        self.drafter = Drafter()

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_waiting_tokens(self) -> int:
        return len(self.tokens)


class Scheduler:
    """Assigns the tokens of each step, pages to texts, and turns to requests.

    Each request that is served and whose prompt is computed gets its next token in every step. Prompts share a chunk of
    the step, that of the tenant that got least first. Who is served gives up its turn, to be computed again later from
    what the pages still hold, where pages run out, where its tenant has more than its share while another waits, and to
    a more urgent request of its own tenant.
    """

    def __init__(self, limits: Limits, drafts_by_model: bool = False):
        """`drafts_by_model`: rows say how many guesses they have room for, instead of having some from the text."""
        self.limits, self.drafts_by_model = limits, drafts_by_model
        self.pool = PagePool(limits.num_pages)
        self.waiting: WaitingQueue[Generation] = WaitingQueue()
        self.running: dict[str, Generation] = {}  # request_id -> generation
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens of prompts that were looked for
        self.prefix_hits = 0  # and found
        self.num_drafts = 0
        self.num_right_drafts = 0
        self._generations: dict[str, Generation] = {}  # request_id -> generation
        self._number = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._generations

    def generations(self) -> list[Generation]:
        """All that wait or are served."""
        return list(self._generations.values())

    def begun(self) -> list[str]:
        """The ids of those that are served, or were and gave up their turn."""
        return [g.request.request_id for g in self._generations.values() if g.scheduled is not None]

    def tokens_ahead(self, tenant: str | None = None) -> int:
        """Tokens that are computed before a new request's prompt: of what waits, and of prompts that are not computed.

        Args:
            tenant: whose; None: of all.
        """
        waiting = self.waiting.num_tokens if tenant is None else self.waiting.waiting(tenant)[1]
        return waiting + sum(
            max(0, len(generation.request.prompt) - generation.num_computed)
            for generation in self.running.values()
            if tenant in (None, generation.tenant)
        )

    def add(self, request: Request, now: float) -> Generation:
        """Takes a request, which fits into the cache and whose id is not in use."""
        assert request.request_id not in self and request.num_tokens <= self.limits.max_context
        self._number += 1
        generation = Generation(request, now, self._number, self.limits.aging_s)
        self._generations[request.request_id] = generation
        self.waiting.enter(generation)
        return generation

    def remove(self, request_id: str) -> Generation:
        """Ends a request. Its pages are free when this returns."""
        generation = self._generations.pop(request_id)
        if self.running.pop(request_id, None) is None:
            self.waiting.remove(generation)
        self._release(generation)
        self.waiting.leave(generation)
        return generation

    def schedule(self, now: float, only: Sequence[str] | None = None) -> list[Row]:
        """The rows of the next step, one for each request that has a part in it; `only` of some, if they are named."""
        if only is not None:
            for generation in [g for g in self.running.values() if g.request.request_id not in only]:
                self._preempt(generation)
        while generation := self._admit(only):
            if generation.scheduled is None:
                generation.scheduled, generation.num_cached = now, generation.num_computed
        rows: list[Row] = []
        chunk_rows = self.limits.chunk_tokens // self.limits.row_tokens
        spare = self.limits.max_requests - len(self.running)  # beside one token of each answer
        for generation in sorted(self.running.values(), key=self._turn):
            if generation.request.request_id not in self.running:
                continue
            left = len(generation.request.prompt) - generation.num_computed
            if left > 0:
                count = min(left, chunk_rows * self.limits.row_tokens)
            else:
                # More than one, where an answer is computed again.
                count = min(len(generation.tokens) - generation.num_computed, 1 + spare)
            if count == 0 or not self._reserve(generation, generation.num_computed + count):
                continue
            rows.append(self._row(generation, count))
            self.waiting.charge(generation.tenant, count)
            if left > 0:
                chunk_rows -= -(-count // self.limits.row_tokens)
            else:
                spare -= count - 1
        # One that has a row may have given up its turn to one that was assigned later.
        return self._with_drafts([row for row in rows if row.request_id in self.running])

    def update(self, row: Row, tokens: Sequence[int]) -> None:
        """Tells what a step computed of a request that is served: the tokens that follow, as many as are right."""
        generation = self.running[row.request_id]
        right = max(0, len(tokens) - 1)  # of the drafts
        self.num_drafts += len(row.drafts)
        self.num_right_drafts += right
        generation.num_computed += len(row.tokens) - len(row.drafts) + right
        generation.tokens += tokens
        self._remember(generation, row.position // self.limits.page_size)

    def add_sums(self, row: Row, sums: Sums) -> np.ndarray | None:
        """Adds what a step computed of a request that wants sums; those of the whole prompt, once it is computed."""
        generation = self.running[row.request_id]
        total = 0.0 if generation.sums is None else generation.sums
        for part in sums.parts:
            total = total + np.asarray(part, np.float64)  # one by one: always the same bits
        generation.sums = np.asarray(total)
        self.update(row, [])
        return generation.sums if generation.num_computed == len(generation.tokens) else None

    def reset(self) -> None:
        """All that pages hold is lost: each request is computed again."""
        for generation in list(self.running.values()):
            self._preempt(generation)
        self.pool.clear()

    def _row(self, generation: Generation, count: int) -> Row:
        request, start = generation.request, generation.num_computed
        stop = start + count
        return Row(
            request.request_id,
            generation.tokens[start:stop],
            start,
            generation.pages[: -(-stop // self.limits.page_size)],
            request.sampling if stop == len(generation.tokens) and not request.sums else None,
            generation.tokens,
            len(request.prompt),
            request.constraint,
            adapter_slot=0 if request.adapter is None else request.adapter.slot,
            sums=request.sums,
        )

    def _with_drafts(self, rows: list[Row]) -> list[Row]:
        """The rows with drafts for those answers whose next tokens can be guessed, as many as cost nothing.

        A step's program has more rows than there are answers: drafts fill what would be padding.
        """
        count = sum(len(row.tokens) for row in rows if not row.is_prompt)
        free = next((n for n in self.limits.answer_rows if n >= count), count) - count
        num_left = sum(not row.is_prompt for row in rows)
        drafted = []
        for row in rows:
            most = min(free, self._draft_room(row))
            if most > 0 and self.drafts_by_model:
                most = min(most, -(-free // num_left))  # a model has guesses for all
                free -= most
                row = dataclasses.replace(row, draft_room=most)
            elif most > 0:
                generation = self.running[row.request_id]
                row = row.with_drafts(generation.drafter.guess(generation.tokens, most))
                free -= len(row.drafts)
            num_left -= not row.is_prompt
            drafted.append(row)
        return drafted

    def _draft_room(self, row: Row) -> int:
        """How many drafts a row could have, by its request and its pages."""
        if row.sampling is None or row.is_prompt or row.constraint is not None:
            return 0
        generation = self.running[row.request_id]
        held = len(generation.pages) * self.limits.page_size - row.position - len(row.tokens)
        left = generation.request.max_tokens - generation.num_output - 1
        return min(self.limits.max_drafts, left, held)

    def _reserve(self, generation: Generation, num_tokens: int) -> bool:
        """Gives a text the pages for so many tokens; False where it had to give up its turn."""
        needed = -(-num_tokens // self.limits.page_size) - len(generation.pages)
        while needed > self.pool.num_free:
            victim = max(self.running.values(), key=self._expendable)
            self._preempt(victim)
            if victim is generation:
                return False
        if needed > 0:
            pages = self.pool.take(needed)
            assert pages is not None
            generation.pages += pages
        return True

    def _admit(self, only: Sequence[str] | None) -> Generation | None:
        """The next request that gets a turn, with what the pages hold of its text."""
        if only is None:
            generation = self.waiting.next()
        else:
            generation = next((self._generations[i] for i in only if i not in self.running), None)
        if generation is None:
            return None
        if len(self.running) >= self.limits.max_requests and not self._make_way(generation):
            return None
        self.waiting.remove(generation)
        size = self.limits.page_size
        self._make_keys(generation, len(generation.tokens))
        # The last token is computed in any case: the next one follows from it.
        reusable = [] if generation.request.sums else generation.keys[: (len(generation.tokens) - 1) // size]
        generation.pages = self.pool.find(reusable)
        generation.num_computed = len(generation.pages) * size
        missing = -(-len(generation.tokens) // size) - len(generation.pages)
        if self.running and missing > self.pool.num_free:
            self._release(generation)
            self.waiting.put_back(generation)
            return None
        # What it finds of its own later on says nothing of prefixes.
        if generation.scheduled is None and not generation.request.sums:
            self.prefix_queries += len(generation.tokens)
            self.prefix_hits += generation.num_computed
        self.running[generation.request.request_id] = generation
        return generation

    def _make_way(self, generation: Generation) -> bool:
        """Takes the turn of one that is served for another that waits, if it ought to have it."""
        counts = self._counts()
        own = [g for g in self.running.values() if g.tenant == generation.tenant]
        if len(own) < self._share():
            over = [g for g in self.running.values() if counts[g.tenant] > self._share()]
        else:
            over = [g for g in own if g.urgency > generation.urgency]
        if not over:
            return False
        self._preempt(max(over, key=lambda g: (counts[g.tenant], g.urgency)))
        return True

    def _turn(self, generation: Generation) -> tuple[float, tuple[float, int]]:
        """The order in which texts get their part of a chunk."""
        return self.waiting.served(generation.tenant), generation.urgency

    def _share(self) -> int:
        """How many requests each tenant may have served while others wait."""
        return max(1, self.limits.max_requests // max(1, self.waiting.num_tenants))

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}  # tenant -> requests that are served
        for generation in self.running.values():
            counts[generation.tenant] = counts.get(generation.tenant, 0) + 1
        return counts

    def _expendable(self, generation: Generation) -> tuple[bool, tuple[float, int]]:
        return self._counts()[generation.tenant] > self._share(), generation.urgency

    def _preempt(self, generation: Generation) -> None:
        del self.running[generation.request.request_id]
        self._release(generation)
        self.waiting.put_back(generation)
        self.num_preemptions += 1

    def _release(self, generation: Generation) -> None:
        self.pool.release(generation.pages)
        generation.pages, generation.num_computed, generation.sums = [], 0, None

    def _remember(self, generation: Generation, first: int) -> None:
        """Makes its full pages known, from the first one that was not."""
        size = self.limits.page_size
        full = generation.num_computed // size
        self._make_keys(generation, generation.num_computed)
        for page, key in zip(generation.pages[first:full], generation.keys[first:full], strict=True):
            self.pool.remember(page, key)

    def _make_keys(self, generation: Generation, num_tokens: int) -> None:
        size, request = self.limits.page_size, generation.request
        if num_tokens // size > len(generation.keys):
            num_prompt = num_tokens if self.limits.reuse_answers else len(request.prompt)
            loading = 0 if request.adapter is None else request.adapter.loading
            salt = f"{loading}:{len(request.tenant)}:{request.tenant}{request.cache_salt}"
            tokens = generation.tokens[:num_tokens]
            generation.keys = prefix_keys(tokens, size, salt, num_prompt=num_prompt, known=generation.keys)
