"""Tests of k-means: against the exact solution, and on numbers that leave nothing to choose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.export.compress.clusters import centres, distortion, histograms, nearest


def exact_distortion(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    """The least weighted distortion of a group, by the dynamic program over all its numbers."""
    order = np.argsort(values)
    v, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    sums = [np.concatenate([[0.0], np.cumsum(x)]) for x in (w, w * v, w * v * v)]
    weight, first, second = (s[None, :] - s[:, None] for s in sums)  # [from, to]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(weight > 0, second - first**2 / weight, 0)
    cost = np.where(np.tril(np.ones_like(cost, dtype=bool), -1), np.inf, np.maximum(cost, 0))
    best = cost[0]
    for _ in range(count - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def _distortion(values: np.ndarray, weights: np.ndarray, points: np.ndarray) -> float:
    chosen = points[nearest(values, points)]
    return float((weights * (values - chosen) ** 2).sum())


_DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "two heaps": lambda rng, n: rng.choice([-1.0, 3.0], n) + 0.01 * rng.standard_normal(n),
    "a grid of 16": lambda rng, n: rng.integers(0, 16, n) * 0.1,
}


@pytest.mark.parametrize("draw", _DRAWS)
@pytest.mark.parametrize("count", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_clusters_are_within_a_hundredth_of_the_best(draw, count, weighted):
    rng = np.random.default_rng(count)
    values = np.stack([_DRAWS[draw](rng, 700) for _ in range(3)]).astype(np.float32)
    weights = (rng.gamma(1.0, size=values.shape) if weighted else np.ones(values.shape)).astype(np.float32)
    found = histograms(values, weights if weighted else None)
    points = centres(found, count)
    assert points.shape == (3, count)
    assert (np.diff(points) >= 0).all()
    ours = sum(_distortion(v, w, p) for v, w, p in zip(values, weights, points, strict=True))
    best = sum(exact_distortion(v, w, count) for v, w in zip(values, weights, strict=True))
    total = float((weights * values**2).sum())
    assert np.sqrt(ours) <= 1.01 * np.sqrt(best) + 1e-4 * np.sqrt(total)
    np.testing.assert_allclose(distortion(found, points).sum(), ours, rtol=0.03, atol=1e-6 * total)


def test_as_many_centres_as_tables_have_entries():
    values = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    points = centres(histograms(values), 256)
    assert points.shape == (2, 256)
    error = [_distortion(v, np.ones(4000), p) for v, p in zip(values, points, strict=True)]
    best = [exact_distortion(v[:1000], np.ones(1000), 64) for v in values]
    assert max(error) < min(best) / 2


@pytest.mark.parametrize(
    "values", [[0.0] * 5, [2.5] * 40, [1.0, 2.0, 3.0], [1e-30, -1e-30], [1e4, -6e4, 0.0, 1e3]]
)
@pytest.mark.parametrize("count", [2, 4, 16])
def test_few_different_numbers_are_all_hit(values, count):
    group = np.array([values], np.float32)
    points = centres(histograms(group), count)
    assert np.isfinite(points).all()
    if len(set(values)) <= count:
        np.testing.assert_allclose(points[0][nearest(group[0], points[0])], group[0], rtol=1e-6, atol=1e-12)


def test_a_group_that_nothing_depends_on_is_clustered_all_the_same():
    values = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    weights = np.ones_like(values)
    weights[0] = 0
    points = centres(histograms(values, weights), 8)
    np.testing.assert_allclose(points[0], centres(histograms(values[:1]), 8)[0], rtol=1e-5, atol=1e-5)


def test_numbers_that_count_more_are_met_more_closely():
    values = np.random.default_rng(0).standard_normal((1, 5000)).astype(np.float32)
    weights = np.where(values > 1, 1000, 1).astype(np.float32)
    plain, weighted = (centres(histograms(values, w), 4)[0] for w in (None, weights))
    assert _distortion(values[0], weights[0], weighted) < _distortion(values[0], weights[0], plain) / 3
    assert (weighted > 1).sum() >= 3


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.sampled_from([2, 4, 16, 64]), st.integers(0, 2**32 - 1), st.floats(-3, 4))
def test_any_group_has_finite_ascending_centres(size, count, seed, scale):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((2, size)) * 10**scale).round(1).astype(np.float32)
    weights = rng.integers(0, 2, values.shape).astype(np.float32)
    points = centres(histograms(values, weights), count)
    assert np.isfinite(points).all()
    assert (np.diff(points) >= 0).all()
