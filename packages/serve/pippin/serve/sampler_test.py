"""The sampler against distributions computed with NumPy, and what each control does to them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pippin.serve.engine.request import CONSTRAINT_FAILED, Sampling
from pippin.serve.engine.scheduler import Row
from pippin.serve.errors import ConstraintError
from pippin.serve.sampler import Sampler

_V = 50
_SAMPLER = Sampler(_V)
_LOGITS = (3 * np.random.default_rng(0).standard_normal((4, _V))).astype(np.float32)
_DRAWS = 4000


def row(sampling, history=(1, 2), num_prompt=1, constraint=None):
    return Row("r", [history[-1]], len(history) - 1, [0], sampling, list(history), num_prompt, constraint)


def choose(logits, *rows):
    padded = np.zeros((4, _V), np.float32)
    padded[: len(rows)] = np.broadcast_to(logits, (len(rows), _V))
    return _SAMPLER(jnp.asarray(padded), [*rows, *[None] * (4 - len(rows))])[: len(rows)]


def draws(logits, **sampling):
    """How often each token is drawn with as many seeds, as parts of one."""
    counts = np.zeros(_V)
    for seed in range(0, _DRAWS, 4):
        rows = [row(Sampling(**{"temperature": 1.0, **sampling}, seed=seed + i)) for i in range(4)]
        for sampled in choose(logits, *rows):
            counts[sampled.token] += 1
    return counts / _DRAWS


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def assert_drawn_from(counts, p):
    assert not counts[p == 0].any(), "a token was drawn that cannot be"
    # Five standard deviations of each token's count, for all tokens.
    assert np.all(np.abs(counts - p) <= 5 * np.sqrt(p * (1 - p) / _DRAWS) + 1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_distribution(temperature):
    counts = draws(_LOGITS[0], temperature=temperature)
    assert_drawn_from(counts, softmax(_LOGITS[0] / temperature))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 5}, lambda p, order: order[:5]),
        ({"top_p": 0.7}, lambda p, order: order[: 1 + np.searchsorted(np.cumsum(p[order]), 0.7)]),
        ({"min_p": 0.1}, lambda p, order: np.flatnonzero(p >= 0.1 * p.max())),
        (
            {"top_k": 8, "top_p": 0.6},
            lambda p, order: order[: 1 + np.searchsorted(np.cumsum(p[order[:8]]), 0.6 * p[order[:8]].sum())],
        ),
    ],
    ids=["top_k", "top_p", "min_p", "both"],
)
def test_filters_keep_what_they_should(sampling, kept):
    p = softmax(_LOGITS[1])
    keep = kept(p, np.argsort(-p))
    expected = np.zeros(_V)
    expected[keep] = p[keep] / p[keep].sum()
    assert_drawn_from(draws(_LOGITS[1], **sampling), expected)


def test_temperature_zero_takes_the_most_likely():
    greedy = [row(Sampling(temperature=0.0, seed=i)) for i in range(4)]
    assert [s.token for s in _SAMPLER(jnp.asarray(_LOGITS), greedy)] == _LOGITS.argmax(-1).tolist()
    tied = np.where(np.arange(_LOGITS.shape[1]) % 3 == 1, 9.0, _LOGITS)
    assert [s.token for s in _SAMPLER(jnp.asarray(tied), greedy)] == [1] * 4  # the first of equals


def test_a_row_draws_the_same_whatever_the_others_ask_for():
    mine = row(Sampling(temperature=1.0, top_p=0.9, seed=5, logprobs=3))
    alone = choose(_LOGITS[0], mine)[0]
    for other in (
        Sampling(temperature=0.0),
        Sampling(temperature=2.0, top_k=3),
        Sampling(frequency_penalty=1.0),
    ):
        assert choose(_LOGITS[0], mine, row(other), row(other))[0] == alone


def test_all_bits_of_a_seed_count():
    seeds = [5, 5 + (1 << 32), 5 + (1 << 62)]
    drawn = [[choose(0.0, row(Sampling(seed=s), [1] * n))[0].token for n in range(2, 12)] for s in seeds]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_each_token_of_an_answer_is_drawn_anew():
    tokens = {choose(np.zeros(_V), row(Sampling(seed=5), history=[1] * (2 + i)))[0].token for i in range(20)}
    assert len(tokens) > 8


def test_penalties_and_bias_change_logits_as_they_say():
    logits = np.zeros(_V, np.float32)
    logits[[3, 4, 5]] = [2.0, 1.9, -0.1]
    history = (9, 3, 3, 5)  # the prompt is the first

    def best(**sampling):
        return choose(logits, row(Sampling(temperature=0.0, **sampling), history))[0].token

    assert best() == 3
    assert best(frequency_penalty=0.04) == 3  # 2 - 0.08
    assert best(frequency_penalty=0.06) == 4  # 2 - 0.12
    assert best(presence_penalty=0.2) == 4
    assert best(repetition_penalty=1.1) == 4  # 2 / 1.1
    assert best(logit_bias={7: 2.5}) == 7
    assert best(logit_bias={7: 2.5, 8: 100.0}) == 8


def test_a_repetition_penalty_counts_the_prompt_and_lowers_negative_logits_too():
    logits = np.full(_V, -1.0, np.float32)
    logits[9] = -0.9
    penalised = row(Sampling(temperature=0.0, repetition_penalty=1.5), history=(9, 3))
    assert choose(logits, penalised)[0].token not in (9, 3)  # -1.35 and -1.5


def test_log_probabilities_are_the_models_own():
    sampled = choose(_LOGITS[2], row(Sampling(temperature=0.3, top_k=2, seed=3, logprobs=4)))[0]
    p = np.log(softmax(_LOGITS[2]))
    order = np.argsort(-p)
    assert sampled.logprob == pytest.approx(p[sampled.token], abs=1e-5)
    assert [i for i, _ in sampled.top] == order[:4].tolist()
    np.testing.assert_allclose([q for _, q in sampled.top], p[order[:4]], atol=1e-5)


def test_of_no_tokens_beside_its_own_a_row_may_be_told_the_log_probability():
    sampled = choose(_LOGITS[2], row(Sampling(temperature=0.0, logprobs=0)))[0]
    assert sampled.top == ()
    assert sampled.logprob == pytest.approx(np.log(softmax(_LOGITS[2])).max(), abs=1e-5)


class Only:
    """A constraint that allows some tokens."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def write_mask(self, allowed):
        allowed[:] = 0
        for token in self.tokens:
            allowed.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token):
        return False


class Faulty(Only):
    def write_mask(self, allowed):
        raise RuntimeError("a faulty constraint")


def test_a_constraint_leaves_what_it_allows():
    only = Only(31, 32, 47)
    assert {choose(0.0, row(Sampling(seed=i), constraint=only))[0].token for i in range(40)} == {31, 32, 47}
    likely = max((31, 32, 47), key=lambda t: _LOGITS[0][t])
    assert choose(_LOGITS[0], row(Sampling(temperature=0.0), constraint=only))[0].token == likely


@pytest.mark.parametrize("constraint", [Only(), Faulty()], ids=["nothing", "faulty"])
def test_where_nothing_is_allowed_there_is_no_token_and_others_have_theirs(constraint):
    bad, good = choose(_LOGITS[0], row(Sampling(), constraint=constraint), row(Sampling(temperature=0.0)))
    assert (bad.token, good.token) == (-1, _LOGITS[0].argmax())


class TooMuch(Only):
    def write_mask(self, allowed):
        raise ConstraintError("too many items")


def test_a_constraint_that_takes_too_much_is_told_apart(caplog):
    bad, good = choose(_LOGITS[0], row(Sampling(), constraint=TooMuch()), row(Sampling(temperature=0.0)))
    assert (bad.token, good.token) == (CONSTRAINT_FAILED, _LOGITS[0].argmax())
    assert "too many items" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling()], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite_give_no_token(value, sampling):
    logits = _LOGITS[0].copy()
    logits[3] = value
    assert choose(logits, row(sampling))[0].token == -1


def test_rows_that_ask_for_nothing_get_nothing():
    assert _SAMPLER(jnp.asarray(_LOGITS), [None, row(None), None, None]) == [None] * 4
