"""Weighted k-means in one dimension, of many groups of numbers at once. NumPy only.

A group's numbers are counted in 4096 bins, which are narrow where numbers are many; all else is arithmetic on the bins'
sums. Centres start where a dynamic program over a coarser cut of the bins puts them, and Lloyd's iterations move them. In
one dimension clusters are intervals, so that an iteration is a look-up in prefix sums. Until then a bin lies in one cluster
as a whole; what is assigned to a centre at the end goes by the numbers themselves.

Sources: Wang and Song 2011, The R Journal 3(2) (the dynamic program); Panter and Dite 1951, Proc. IRE 39(1) (the best
centres of many lie by the cube root of the density: so the coarser cut is made); Lloyd 1982, IEEE Trans. Inf. Theory 28(2).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_BINS = 4096
_MOST_ITERATIONS = 60
_SETTLED = 1e-4  # of the spread of a group: where no centre moves further, Lloyd's iterations end
_SMOOTH = 12  # bins to each side


@dataclasses.dataclass(frozen=True)
class Histograms:
    """Groups of numbers as prefix sums over bins. Row g, column b: of all numbers of group g below bin b."""

    middle: np.ndarray  # [G, 1], the mean of a group
    spread: np.ndarray  # [G, 1], its standard deviation
    low: np.ndarray  # [G, 1], the lower end of the first bin, as `_squeezed`
    width: np.ndarray  # [G, 1], of a bin, as `_squeezed`
    weights: np.ndarray  # [G, bins + 1], the sum of the weights
    sums: np.ndarray  # [G, bins + 1], of weight times number
    squares: np.ndarray  # [G, bins + 1], of weight times the number's square

    def bins(self, numbers: np.ndarray) -> np.ndarray:
        """In which bin a number of a group lies, with the fraction of it: [G, ...]."""
        return (_squeezed(numbers, self.middle, self.spread) - self.low) / self.width


def _squeezed(numbers: np.ndarray, middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Numbers on a scale that is even near the middle, and logarithmic far from it, where numbers are few."""
    return np.arcsinh((numbers - middle) / spread)


def histograms(values: np.ndarray, weights: np.ndarray | None = None) -> Histograms:
    """Groups of numbers, counted.

    Args:
        values: float32 [G, n], finite.
        weights: [G, n], finite and not negative; None: all 1. A group of weights that are all 0 counts as one of ones.
    """
    groups = len(values)
    middle = values.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    spread = np.maximum(values.std(axis=1, keepdims=True), np.float32(1e-30))
    squeezed = _squeezed(values, middle, spread)
    low = squeezed.min(axis=1, keepdims=True)
    width = np.maximum((squeezed.max(axis=1, keepdims=True) - low) / _BINS, np.float32(1e-12))
    bins = np.minimum((squeezed - low) / width, _BINS - 1).astype(np.intp)
    bins += (np.arange(groups) * _BINS)[:, None]
    flat, numbers = bins.reshape(-1), values.reshape(-1).astype(np.float64)
    of_weights = None
    if weights is not None:
        idle = ~weights.any(axis=1, keepdims=True)
        of_weights = np.where(idle, 1.0, weights).reshape(-1).astype(np.float64)

    def prefix(of_each: np.ndarray | None) -> np.ndarray:
        of_bins = np.bincount(flat, of_each, groups * _BINS).reshape(groups, _BINS)
        return _running(of_bins)

    weighted = numbers if of_weights is None else numbers * of_weights
    return Histograms(
        middle, spread, low, width, prefix(of_weights), prefix(weighted), prefix(weighted * numbers)
    )


def centres(found: Histograms, count: int) -> np.ndarray:
    """The centres of so many clusters, ascending: [G, count], in float64.

    There are that many even where a group has fewer different numbers.
    """
    cells = max(160, min(8 * count, 5 * count + 192))
    longest = cells if count <= 16 else max(24, 5 * cells // count)
    cuts = _program(found, _cells(found, cells), count, longest)
    lowest = np.repeat(found.middle.astype(np.float64), count, axis=1)
    points = _means(found, cuts, lowest)
    for _ in range(_MOST_ITERATIONS):
        moved = _means(found, _cuts_between(found, points), points)
        settled = (np.abs(moved - points) <= _SETTLED * found.spread).all()
        points = moved
        if settled:
            break
    return np.sort(points, axis=1)


def distortion(found: Histograms, points: np.ndarray) -> np.ndarray:
    """The sum over a group of weight times squared distance to the nearest of its centres: [G]."""
    points = np.sort(points, axis=1)
    cuts = _cuts_between(found, points)
    weights, sums, squares = (
        np.diff(_at(p, cuts), axis=1) for p in (found.weights, found.sums, found.squares)
    )
    return np.maximum(squares - 2 * points * sums + points**2 * weights, 0).sum(axis=1)


def nearest(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """For each number of a group, [n], which of its centres, [k] and ascending, is nearest: uint8 [n]."""
    points = points.astype(np.float32)
    return np.searchsorted((points[1:] + points[:-1]) / 2, values).astype(np.uint8)


def _running(of_bins: np.ndarray) -> np.ndarray:
    """Sums of all before each bin, and of all: [G, bins + 1]."""
    sums = np.zeros((len(of_bins), of_bins.shape[1] + 1))
    np.cumsum(of_bins, axis=1, out=sums[:, 1:])
    return sums


def _at(prefix: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    return np.take_along_axis(prefix, cuts, axis=1)


def _means(found: Histograms, cuts: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The weighted mean between cuts, [G, k]; `empty` where there is nothing between them."""
    weights, sums = (np.diff(_at(prefix, cuts), axis=1) for prefix in (found.weights, found.sums))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weights > 0, sums / weights, empty)


def _cuts_between(found: Histograms, points: np.ndarray) -> np.ndarray:
    """The bins at which another centre becomes the nearest, and both ends: [G, k + 1]."""
    points = np.sort(points, axis=1)
    cuts = np.rint(found.bins((points[:, 1:] + points[:, :-1]) / 2))
    return _with_ends(np.clip(cuts, 0, _BINS).astype(np.intp))


def _with_ends(inner: np.ndarray) -> np.ndarray:
    ends = np.zeros((len(inner), 1), np.intp)
    return np.concatenate([ends, inner, ends + _BINS], axis=1)


def _cells(found: Histograms, count: int) -> np.ndarray:
    """Bins that cut the cube root of the density into even parts, and both ends: [G, count + 1]."""
    at = np.arange(_BINS)
    # Neighbours together: of few numbers most bins are empty, which a density is not.
    upper, lower = np.minimum(at + _SMOOTH, _BINS), np.maximum(at - _SMOOTH, 0)
    mass = (found.weights[:, upper] - found.weights[:, lower]) / (upper - lower)
    edges = np.sinh(found.low + np.arange(_BINS + 1) * found.width)
    roots = _running(np.cbrt(mass * np.diff(edges, axis=1) ** 2))
    roots /= roots[:, -1:]
    wanted = np.arange(1, count) / count
    return _with_ends(np.stack([np.searchsorted(row, wanted) for row in roots]))


def _program(found: Histograms, edges: np.ndarray, count: int, longest: int) -> np.ndarray:
    """The best cuts into clusters of up to `longest` cells, among the edges of cells: [G, count + 1].

    Of many clusters, the n-th ends within 2 * longest cells of where it would if all had the same number of cells.
    """
    groups, cells = len(edges), edges.shape[1] - 1
    cost = _interval_costs(found, edges, longest)
    best = np.full(
        (groups, longest + cells + 1), np.inf
    )  # of the clusters so far, by the cell that they end before
    best[:, longest] = 0
    came_from, starts = [], []
    for n in range(1, count + 1):
        middle = round(n * cells / count)
        start, stop = max(middle - 2 * longest, 0), min(middle + 2 * longest, cells) + 1
        if n == count:
            start, stop = cells, cells + 1
        total = sliding_window_view(best, longest, axis=1)[:, start:stop] + cost[:, start:stop]
        choice = total.argmin(axis=2)
        best = np.full_like(best, np.inf)
        best[:, longest + start : longest + stop] = np.take_along_axis(total, choice[..., None], axis=2)[
            ..., 0
        ]
        came_from.append(choice)
        starts.append(start)
    at, rows = np.full(groups, cells), np.arange(groups)
    cuts = [at]
    for choice, start in zip(reversed(came_from), reversed(starts), strict=True):
        at = at - longest + choice[rows, at - start]
        cuts.append(at)
    return np.take_along_axis(edges, np.stack(cuts[::-1], axis=1), axis=1)


def _interval_costs(found: Histograms, edges: np.ndarray, longest: int) -> np.ndarray:
    """The distortion of one cluster of the cells from j - longest + w up to j: [G, j, w]. An empty one may be anywhere."""
    ends = (_at(p, edges) for p in (found.weights, found.sums, found.squares))
    padded = [np.pad(p, ((0, 0), (longest, 0)), mode="edge") for p in ends]
    weights, sums, squares = (
        p[:, longest:, None] - sliding_window_view(p, longest, axis=1)[:, :-1] for p in padded
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(squares - np.where(weights > 0, sums**2 / weights, 0), 0)
