"""A draft model: its guesses save steps, and change no answer, whatever it guesses and however it fails."""

import dataclasses

import pytest

from pippin.serve.engine.draft_model import DraftModel
from pippin.serve.engine.engine import Engine
from pippin.serve.engine.request import Request, Sampling
from pippin.serve.engine.scheduler import Limits
from pippin.serve.engine.testing import FakeRunner, answer, serve_all, token_bytes

_LIMITS = Limits(num_pages=64, page_size=4, max_requests=8, chunk_tokens=32, row_tokens=4)


class _Contrary(FakeRunner):
    """Agrees with the larger model about every other token."""

    def _sample(self, row):
        sampled = super()._sample(row)
        return [type(one)(one.token + 1 if len(row.history) % 2 else one.token) for one in sampled]


def _requests(count: int = 6, max_tokens: int = 20) -> list[Request]:
    return [
        Request(
            request_id=str(i),
            prompt=tuple(range(97, 100 + 5 * i)),
            max_tokens=max_tokens,
            sampling=Sampling(seed=i, temperature=1.0, logprobs=None),
            text=False,
        )
        for i in range(count)
    ]


def _serve(requests, draft, limits=_LIMITS):
    """The tokens of each request, how many steps there were, and the engine's load at the end."""
    runner = FakeRunner(limits)
    engine = Engine(runner, limits, token_bytes, draft_model=None if draft is None else DraftModel(draft))
    told = serve_all(engine, requests, timeout_s=30)
    found = {request_id: [one.token for one in tokens] for request_id, tokens in told.items()}
    return found, len(runner.steps), engine.load()


def _expected(requests):
    return {r.request_id: answer(r.prompt, r.max_tokens, r.sampling.seed) for r in requests}


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_model_that_agrees_saves_steps(count):
    requests, draft = _requests(count), FakeRunner(_LIMITS)
    found, steps, load = _serve(requests, draft)
    plain, plain_steps, _ = _serve(requests, None)
    assert found == plain == _expected(requests)
    assert steps < plain_steps
    assert load.right_drafts == load.drafts > 0
    assert load.used_pages == 0


@pytest.mark.parametrize("pages", [64, 24])
def test_a_model_that_is_often_wrong_changes_no_answer(pages):
    limits = Limits(num_pages=pages, page_size=4, max_requests=8, chunk_tokens=32, row_tokens=4, longest=60)
    requests = _requests()
    found, _, load = _serve(requests, _Contrary(limits), limits)
    assert found == _expected(requests)
    assert 0 < load.right_drafts < load.drafts
    assert (load.preemptions > 0) == (pages == 24)


def test_a_model_that_fails_is_asked_no_more(caplog):
    limits = dataclasses.replace(_LIMITS, max_requests=1)
    requests, draft = _requests(), FakeRunner(limits)
    draft.broken = {r.request_id for r in requests}
    found, _, load = _serve(requests, draft, limits)
    assert found == _expected(requests)
    assert caplog.text.count("the draft model failed") == 3 and "asked no more" in caplog.text
    assert load.used_pages == 0


def test_a_model_that_fails_now_and_then_is_asked_again(caplog):
    class Moody(FakeRunner):
        count = 0

        def run(self, rows):
            self.count += 1
            if self.count % 4 == 0:
                raise RuntimeError("not now")
            return super().run(rows)

    # One after the other: of what it was reading when it failed, it guesses no more.
    limits = dataclasses.replace(_LIMITS, max_requests=1)
    requests = [dataclasses.replace(r, prompt=(100 + i, *r.prompt)) for i, r in enumerate(_requests(12))]
    found, _, load = _serve(requests, Moody(limits), limits)
    assert found == _expected(requests)
    assert caplog.text.count("the draft model failed") > 3 and "asked no more" not in caplog.text
    assert load.drafts > 0


def test_what_was_not_read_is_read_in_parts():
    limits = Limits(num_pages=512, page_size=4, max_requests=8, chunk_tokens=32, row_tokens=4)
    # Eight answers leave no room for guesses, until the first one ends: the others are far behind by then.
    requests = _requests(8, max_tokens=120)
    requests[0] = dataclasses.replace(requests[0], max_tokens=60)
    draft = FakeRunner(limits)
    found, _, load = _serve(requests, draft, limits)
    assert found == _expected(requests)
    answers = [sum(len(row.tokens) for row in step if not row.is_prompt) for step in draft.steps]
    assert max(answers) <= 32 + 8
    assert load.right_drafts > 0


def test_a_model_whose_cache_is_gone_is_asked_no_more(caplog):
    class Gone(FakeRunner):
        gone = False

        def reset(self):
            if self.gone:
                raise MemoryError
            super().reset()

    requests, draft = _requests(), Gone(_LIMITS)
    draft.broken, draft.gone = {"0"}, True
    assert _serve(requests, draft)[0] == _expected(requests)
    assert "cannot be made anew" in caplog.text


def test_no_draft_goes_beyond_what_was_asked_for():
    requests = _requests(2, max_tokens=3)
    found, _, _ = _serve(requests, FakeRunner(_LIMITS))
    assert found == _expected(requests)
