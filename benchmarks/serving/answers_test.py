from __future__ import annotations

import math

import pytest

from benchmarks.serving.answers import Answer, Ending, Slo, figures, percentile


def _answer(sent_s: float, *token_s: float, ending: Ending = Ending.WHOLE) -> Answer:
    return Answer(sent_s, token_s, ending, token_s[-1] if token_s else sent_s + 0.01)


SLO = Slo(first_s=1.0, per_token_s=0.5)


def test_a_percentile_is_a_value_that_came() -> None:
    assert percentile([5, 1, 3], 50) == 3
    assert percentile(range(1, 101), 99) == 99
    assert percentile([7], 99) == 7
    assert percentile([1, math.inf], 99) == math.inf
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (_answer(0, 1.0, 1.5, 2.0), True),
        (_answer(0, 1.1, 1.2), False),  # late
        (_answer(0, 0.5, 2.0), False),  # slow
        (_answer(0, 0.5, ending=Ending.UNFINISHED), False),
        (_answer(0, ending=Ending.SHED), False),
        (_answer(0, 0.5), True),  # one token
    ],
)
def test_who_keeps_the_slo(answer: Answer, kept: bool) -> None:
    assert SLO.keeps(answer) == kept


def test_who_takes_longer_than_the_longest_cannot_keep_the_slo() -> None:
    assert SLO.longest_s(3) == 2.0
    assert SLO.keeps(_answer(0, 1.0, 1.5, 2.0)) and not SLO.keeps(_answer(0, 1.0, 1.5, 2.01))


def test_figures_of_a_load() -> None:
    answers = [
        _answer(0.0, 0.5, 0.6, 0.9),
        _answer(1.0, 3.0, 3.1, 3.2),  # late
        _answer(2.0, ending=Ending.SHED),
        _answer(3.0, 3.5, ending=Ending.UNFINISHED),
    ]
    found = figures([_answer(-1.0, 0.1), *answers], (0.0, 3.5), SLO)
    assert found.requests == 4  # who was sent before it, and has a token in it, is none of them
    assert found.tokens_per_s == pytest.approx(7 / 3.5)  # the token at 3.5 is beyond the window
    assert found.goodput_per_s == pytest.approx(1 / 3.5)
    assert (found.shed, found.unfinished) == (0.25, 0.25)
    assert found.shed_s == pytest.approx(0.01)
    assert found.first_s == (0.5, 2.0)  # of three that were admitted
    assert found.per_token_s == pytest.approx((0.1, 0.2))
    assert found.gap_s == pytest.approx((0.1, 0.3))


def test_what_never_came_is_null_in_a_file() -> None:
    found = figures([_answer(0, ending=Ending.UNFINISHED)], (0.0, 1.0), SLO)
    assert found.first_s == (math.inf, math.inf)
    assert found.row()["first_s"] == [None, None]
