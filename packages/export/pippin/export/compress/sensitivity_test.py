"""Tests of what compression is expected to cost: against what it does cost a map whose loss is known."""

import numpy as np
import pytest

from pippin.export.compress.calibrate import LinearStatistics
from pippin.export.compress.config import PaletteConfig, Weighting
from pippin.export.compress.sensitivity import importance, options


def _statistics(x: np.ndarray, g: np.ndarray) -> LinearStatistics:
    both = np.einsum("ti,tj->ij", x**2, g**2) / len(x)
    return LinearStatistics((x**2).mean(0), both.sum(1), both.sum(0))


def test_the_expected_loss_is_the_second_order_effect():
    # Where inputs and gradients are of one token scale each, the matrix of means is the product of its sums.
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((4000, n)) for n in (64, 32))
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    statistics = _statistics(x.astype(np.float32), g.astype(np.float32))
    found = options("w", weight, statistics, PaletteConfig(), (2, 4))
    assert [o.bits for o in found] == [2, 4]
    for option in found:
        palettizer = PaletteConfig(bits=option.bits).build()
        stored = palettizer.compress("w", weight, importance(statistics, Weighting.LOSS))
        assert option.nbytes == stored.nbytes
        error = stored.dequantized() - weight
        expected = 0.5 * float(np.square(x @ error).mean(axis=0) @ np.square(g).mean(axis=0))
        np.testing.assert_allclose(option.loss, expected, rtol=0.1)


def test_tokens_with_large_inputs_and_no_gradient_do_not_count():
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((1000, n)).astype(np.float32) for n in (64, 32))
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    plain = options("w", weight, _statistics(x, g), PaletteConfig(), (3,))[0].loss
    x[0], g[0] = 1000 * x[0], 0
    sunk = options("w", weight, _statistics(x, g), PaletteConfig(), (3,))[0].loss
    np.testing.assert_allclose(sunk, plain, rtol=0.02)


def test_what_counts_is_chosen():
    statistics = LinearStatistics(*(np.full(n, float(n), np.float32) for n in (4, 4, 2)))
    assert importance(statistics, Weighting.NONE) is None
    assert importance(None, Weighting.LOSS) is None
    by_inputs, by_loss = (importance(statistics, w) for w in (Weighting.ACTIVATIONS, Weighting.LOSS))
    assert by_inputs is not None
    assert by_loss is not None
    np.testing.assert_array_equal(by_inputs.outputs, [1, 1])
    assert float((by_loss.inputs[:, None] * by_loss.outputs).sum()) == pytest.approx(
        statistics.loss_inputs.sum()
    )
