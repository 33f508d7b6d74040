"""Random traces of requests against what must hold at each step, and what is promised of their order."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.errors import ConfigError
from pippin.serve.engine.draft_model import DraftModel
from pippin.serve.engine.request import Adapter, Request, Sampling, Sums
from pippin.serve.engine.scheduler import Limits, Scheduler
from pippin.serve.engine.testing import FakeRunner, answer, hidden

LIMITS = Limits(num_pages=12, page_size=4, max_requests=3, chunk_tokens=8, row_tokens=4, aging_s=4.0)


def make_request(request_id="r", prompt=b"hello", max_tokens=4, **kwargs):
    return Request(request_id=request_id, prompt=tuple(prompt), max_tokens=max_tokens, **kwargs)


@dataclasses.dataclass(frozen=True)
class Arrival:
    at: int  # the step
    request: Request
    cancelled_after: int | None  # steps


@dataclasses.dataclass(frozen=True)
class Trace:
    arrivals: tuple[Arrival, ...]
    exchange_at: int | None  # the step from which only those go on that have begun, until they have ended
    resets: frozenset[int]  # steps before which all that pages hold is lost


# Two in one slot, one after the other.
_ADAPTERS = [None, None, Adapter("a", 1, 1), Adapter("a", 1, 2), Adapter("b", 2, 3)]


def _arrivals(number):
    prompts = st.lists(st.sampled_from(b"ab"), min_size=1, max_size=30).map(bytes)
    return st.builds(
        lambda at, prompt, max_tokens, priority, tenant, salt, cancelled, adapter, sums: Arrival(
            at,
            make_request(
                str(number),
                prompt,
                0 if sums else max_tokens,
                priority=priority,
                tenant=tenant,
                cache_salt=salt,
                adapter=adapter,
                sums=sums,
            ),
            cancelled,
        ),
        st.integers(0, 12),
        prompts,
        st.integers(1, 10),
        st.integers(-3, 3),
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["", "salt"]),
        st.none() | st.integers(0, 20),
        st.sampled_from(_ADAPTERS),
        st.integers(0, 4).map(lambda number: number == 0),
    )


traces = st.builds(
    Trace,
    st.integers(1, 12).flatmap(lambda n: st.tuples(*(_arrivals(i) for i in range(n)))),
    st.none() | st.integers(0, 20),
    st.frozensets(st.integers(0, 30), max_size=2),
)


class Contrary(FakeRunner):
    """Agrees with the larger model about every other token."""

    def _sample(self, row):
        sampled = super()._sample(row)
        return [type(one)(one.token + 1 if len(row.history) % 2 else one.token) for one in sampled]


class World:
    """A scheduler and a runner, step by step, with what must hold checked at each."""

    def __init__(self, limits=LIMITS, letters=26, draft=None):
        self.limits = limits
        self.scheduler, self.runner = Scheduler(limits, draft is not None), FakeRunner(limits, letters)
        self.draft_model = None if draft is None else DraftModel(draft)
        self.done = {}  # request_id -> output
        self.now = 0.0

    def step(self, only=None):
        self.now += 1.0
        rows = self.scheduler.schedule(self.now, only)
        self.check(rows, only)
        if self.draft_model is not None:
            rows = self.draft_model.draft(rows)
            assert all(len(row.drafts) <= row.draft_room for row in rows)
            self.check(rows, only)
        sampled = self.runner.run(rows)  # which checks that the pages hold the texts
        for row, of_row in zip(rows, sampled, strict=True):
            generation = self.scheduler.running[row.request_id]
            if isinstance(of_row, Sums):
                sums = self.scheduler.add_sums(row, of_row)
                ended, output = sums is not None, sums
            else:
                self.scheduler.update(row, row.accepted([one.token for one in of_row], lambda token: token))
                ended = generation.num_output >= generation.request.max_tokens
                output = generation.tokens[len(generation.request.prompt) :]
            if ended:
                self.done[row.request_id] = output
                self.scheduler.remove(row.request_id)
        return rows

    def check(self, rows, only=None):
        scheduler, limits, pool = self.scheduler, self.limits, self.scheduler.pool
        users = collections.Counter(page for g in scheduler.generations() for page in g.pages)
        assert pool.num_free == pool.num_pages - len(users)
        assert len(scheduler.running) <= limits.max_requests
        waits = scheduler.generations() if only is None else only
        assert bool(rows) == bool(waits), "a step computes nothing although somebody waits"
        assert only is None or {row.request_id for row in rows} <= set(only)
        assert len({row.request_id for row in rows}) == len(rows)
        chunk = sum(-(-len(row.tokens) // limits.row_tokens) for row in rows if row.is_prompt)
        assert chunk <= limits.chunk_tokens // limits.row_tokens
        answers = [row for row in rows if not row.is_prompt]
        assert sum(len(row.tokens) - len(row.drafts) for row in answers) <= limits.max_requests
        assert sum(len(row.tokens) for row in answers) <= max(limits.answer_rows)
        assert all(row.position + len(row.tokens) <= row.num_prompt for row in rows if row.is_prompt)
        written = collections.Counter(
            row.pages[position // limits.page_size]
            for row in rows
            for position in {p // limits.page_size * limits.page_size for p in self._positions(row)}
        )
        for page, writers in written.items():
            assert writers == 1 and users[page] == 1, "a page that is written has one user"

    @staticmethod
    def _positions(row):
        return range(row.position, row.position + len(row.tokens))


def _expected(request):
    """A request's answer, or its sums, if it were alone."""
    if request.sums:
        return sum(hidden(token).astype(np.float64) for token in request.prompt)
    if request.adapter is None:
        return answer(request.prompt, request.max_tokens, letters=2)
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append(answer(tokens, 1, letters=2)[0] - 32)  # a capital letter
    return tokens[len(request.prompt) :]


@pytest.mark.parametrize("draft", [None, FakeRunner, Contrary], ids=["text", "agreeing", "contrary"])
@settings(max_examples=200, deadline=None)
@given(trace=traces)
def test_every_trace_ends_with_every_request_answered_as_if_alone(draft, trace):
    # Of two letters, half of what is guessed is right.
    world = World(letters=2, draft=None if draft is None else draft(LIMITS, 2))
    cancelled, exchanges = set(), False
    for step in range(2000):
        if step == trace.exchange_at:
            exchanges = True
        for arrival in trace.arrivals:
            request_id = arrival.request.request_id
            if arrival.at == step:
                world.scheduler.add(arrival.request, world.now)
            ends = arrival.cancelled_after
            if ends is not None and arrival.at + ends == step and request_id in world.scheduler:
                world.scheduler.remove(request_id)
                cancelled.add(request_id)
        begun = world.scheduler.begun()
        if step in trace.resets or (exchanges and not begun):
            world.scheduler.reset()
            world.runner.reset()
            exchanges = exchanges and bool(begun)
        if not world.scheduler.generations() and step > 40:
            break
        world.step(begun if exchanges else None)
    assert not world.scheduler.generations(), "a request never ends"
    assert world.scheduler.pool.num_free == world.limits.num_pages
    for arrival in trace.arrivals:
        request = arrival.request
        if request.request_id not in cancelled:
            np.testing.assert_array_equal(world.done[request.request_id], _expected(request))


def test_prompt_and_answers_share_a_step():
    world = World(dataclasses.replace(LIMITS, num_pages=30))
    world.scheduler.add(make_request("short", b"ab", 8), 0.0)
    world.step()
    world.scheduler.add(make_request("long", b"b" * 20, 2), 0.0)
    rows = {row.request_id: len(row.tokens) for row in world.step()}
    assert rows == {"short": 1, "long": 8}


def test_a_prefix_that_was_computed_is_not_computed_again():
    world = World()
    world.scheduler.add(make_request("first", b"abcdefghij", 1), 0.0)
    while world.scheduler.generations():
        world.step()
    world.scheduler.add(make_request("second", b"abcdefghxy", 1), 0.0)
    (row,) = world.step()
    assert row.position == 8
    assert (world.scheduler.prefix_queries, world.scheduler.prefix_hits) == (20, 8)


def test_the_last_token_of_a_known_prompt_is_computed():
    world = World()
    for name in ("first", "second"):
        world.scheduler.add(make_request(name, b"abcdefgh", 1), 0.0)
        while world.scheduler.generations():
            rows = world.step()
    assert (rows[0].position, bytes(rows[0].tokens)) == (4, b"efgh")
    assert world.done["second"] == answer(b"abcdefgh", 1)


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": "pepper"}, {"tenant": "asalt"}])
def test_other_tenants_and_salts_share_no_prefix(other):
    world = World()
    for name, whose in (("first", {"tenant": "a", "cache_salt": "salt"}), ("second", other)):
        world.scheduler.add(make_request(name, b"abcdefghij", 1, **whose), 0.0)
        while world.scheduler.generations():
            world.step()
    assert world.scheduler.prefix_hits == 0


def test_a_tenant_that_floods_takes_no_more_than_its_share():
    world = World(dataclasses.replace(LIMITS, max_requests=4, num_pages=100))
    for i in range(50):
        world.scheduler.add(make_request(f"flood{i}", b"%03d" % i, 20, tenant="a", priority=9), 0.0)
    for _ in range(5):
        world.step()
    world.scheduler.add(make_request("guest", b"hello", 4, tenant="b"), 0.0)
    for _ in range(6):
        world.step()
    assert "guest" in world.done  # as soon as if it were alone, but for a step
    assert world.scheduler.num_preemptions == 1


def test_the_more_urgent_of_a_tenant_comes_first_and_nobody_waits_for_ever():
    world = World(dataclasses.replace(LIMITS, max_requests=1, num_pages=100))
    world.scheduler.add(make_request("humble", b"abc", 1, priority=0), 0.0)
    ended = []
    for i in range(40):
        # There is always one with a higher priority: by and by the one that waits is as urgent.
        world.scheduler.add(make_request(f"high{i}", b"xy%02d" % i, 1, priority=2), world.now)
        world.step()
        ended = list(world.done)
        if "humble" in ended:
            break
    assert ended[0] == "high0"
    assert 2 <= ended.index("humble") <= 10


@pytest.mark.parametrize(("reuse", "hits"), [(False, 8), (True, 12)])
def test_an_answer_is_the_beginning_of_a_prompt_only_if_it_may_be(reuse, hits):
    world = World(dataclasses.replace(LIMITS, reuse_answers=reuse))
    world.scheduler.add(make_request("first", b"abcdefgh", 6), 0.0)
    while world.scheduler.generations():
        world.step()
    conversation = [*b"abcdefgh", *world.done["first"], *b"xyz"]
    world.scheduler.add(make_request("second", conversation, 1), 0.0)
    world.step()
    assert world.scheduler.prefix_hits == hits


@pytest.mark.parametrize(("most", "steps"), [(0, 60), (4, 50)])
def test_drafts_save_steps_and_change_no_answer(most, steps):
    world = World(dataclasses.replace(LIMITS, num_pages=40, max_drafts=most), letters=2)
    world.scheduler.add(make_request("r", b"ab", 60), 0.0)
    count = 0
    while world.scheduler.generations():
        world.step()
        count += 1
    assert world.done["r"] == answer(b"ab", 60, letters=2)
    assert count <= steps
    assert (world.scheduler.num_right_drafts > 10) == (most > 0)
    assert world.scheduler.num_right_drafts <= world.scheduler.num_drafts


def test_drafts_take_only_rows_that_would_be_padding():
    world = World(dataclasses.replace(LIMITS, num_pages=60, max_requests=8), letters=2)
    for i in range(4):
        world.scheduler.add(make_request(str(i), b"ab" * 3, 20), 0.0)
    while world.scheduler.generations():
        rows = [row for row in world.step() if not row.is_prompt]
        assert sum(len(row.tokens) for row in rows) <= (4 if len(rows) <= 4 else 8)


@pytest.mark.parametrize("chunk_tokens", [0, 2, 6])
def test_a_chunk_that_holds_no_whole_rows_is_refused(chunk_tokens):
    with pytest.raises(ConfigError, match=f"chunk_tokens is {chunk_tokens}: it must be a multiple of 4"):
        dataclasses.replace(LIMITS, chunk_tokens=chunk_tokens)


def test_preemption_for_want_of_pages_loses_nothing():
    world = World(dataclasses.replace(LIMITS, num_pages=6))
    for name in ("one", "two"):
        world.scheduler.add(make_request(name, name.encode() * 3, 12), 0.0)
    while world.scheduler.generations():
        world.step()
    assert world.scheduler.num_preemptions >= 1
    for name in ("one", "two"):
        assert world.done[name] == answer(name.encode() * 3, 12)


def test_sampling_is_asked_for_at_the_end_of_the_text_only():
    world = World()
    world.scheduler.add(make_request("r", b"x" * 20, 2), 0.0)
    asked = [row.sampling is not None for _ in range(4) for row in world.step()]
    assert asked == [False, False, True, True]
    assert make_request().sampling == Sampling()
