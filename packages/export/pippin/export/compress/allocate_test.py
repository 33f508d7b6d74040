"""Tests of the choice of bits: against all choices there are."""

import itertools

import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.export.compress.allocate import allocate
from pippin.export.compress.sensitivity import Option


def make_options(seed: int, count: int) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(count):
        size, scale = int(rng.integers(1, 9)) * 100, rng.gamma(0.5)
        found[str(i)] = [
            Option(bits, size * bits, scale * float(4.0 ** -(bits + rng.normal(0, 0.3))))
            for bits in (2, 3, 4, 6, 8)
        ]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_is_near_the_least_there_is(seed):
    options = make_options(seed, 5)
    weights = sum(of[0].nbytes // 2 for of in options.values())
    budget = int(3.7 * weights)
    chosen = allocate(options, budget)
    every = itertools.product(*options.values())
    best = min(sum(o.loss for o in c) for c in every if sum(o.nbytes for o in c) <= budget)
    assert sum(o.nbytes for o in chosen.values()) <= budget
    # What a greedy choice may miss is less than one step, and these are few and large.
    assert sum(o.loss for o in chosen.values()) <= 1.35 * best


def test_of_many_weights_next_to_nothing_is_missed():
    options = make_options(3, 400)
    weights = sum(of[0].nbytes // 2 for of in options.values())
    budget = int(3.5 * weights)
    chosen = allocate(options, budget)
    used = sum(o.nbytes for o in chosen.values())
    assert budget * 0.9995 <= used <= budget
    # No mixture is better than the bound that the price of a byte gives.
    prices = np.geomspace(1e-12, 1e-2, 400)
    bound = max(
        sum(min(o.loss + price * o.nbytes for o in of) for of in options.values()) - price * budget
        for price in prices
    )
    assert sum(o.loss for o in chosen.values()) <= 1.01 * bound


def test_a_larger_budget_never_loses_more():
    options = make_options(1, 30)
    weights = sum(of[0].nbytes // 2 for of in options.values())
    losses = [
        sum(o.loss for o in allocate(options, int(b * weights)).values()) for b in (2, 2.5, 3, 3.5, 4, 6, 8)
    ]
    assert losses == sorted(losses, reverse=True)
    assert {o.bits for o in allocate(options, 8 * weights).values()} == {8}


def test_an_average_below_the_smallest_choice_is_refused():
    with pytest.raises(
        ConfigError, match="take 200 bytes, and the average asked for allows 100.*2.000 times"
    ):
        allocate({"a": [Option(2, 200, 1.0)]}, 100)
