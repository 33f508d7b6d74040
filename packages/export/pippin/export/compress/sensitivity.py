"""How much the loss of a model grows with the errors of compressed weights, by their second-order effect.

The Hessian of the loss is taken as its Fisher matrix, and of that the diagonal: an error e in the weight from input i to
output j costs 1/2 * mean(x_i^2 * g_j^2) * e^2 nats a token, g being the gradient at the output. That matrix of means is
taken as the product of its row and column sums over its total, which are cheap. Inputs and gradients are not taken apart:
the largest inputs are those of tokens that hardly any loss depends on, such as the first.

Sources: LeCun et al. 1989, Optimal Brain Damage (the diagonal); Kim et al. 2023, arXiv:2306.07629 (the Fisher matrix for
k-means).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pippin.export.compress.calibrate import LinearStatistics
from pippin.export.compress.config import PaletteConfig, Weighting
from pippin.export.compress.palettize import Importance, Palettizer


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to store a weight."""

    bits: int
    nbytes: int
    loss: float  # by which the model's is expected to grow, in nats a token


def importance(statistics: LinearStatistics | None, weighting: Weighting) -> Importance | None:
    """How much errors in a weight count; None: all alike."""
    if statistics is None or weighting is Weighting.NONE:
        return None
    if weighting is Weighting.ACTIVATIONS:
        return Importance(statistics.inputs, np.ones_like(statistics.loss_outputs))
    total = np.maximum(statistics.loss_outputs.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return Importance(statistics.loss_inputs, statistics.loss_outputs / total)


def options(
    name: str,
    weight: np.ndarray,
    statistics: LinearStatistics | None,
    cfg: PaletteConfig,
    choices: Sequence[int],
) -> list[Option]:
    """What each number of bits costs in bytes and in loss.

    Args:
        name: of the weight, for errors.
        weight: [..., I, O].
        statistics: of what goes through it; None: its inputs and gradients count as 1.
        cfg: how it is put into tables, but for the bits.
        choices: the numbers of bits, ascending.

    Raises:
        QuantizationError: the weight cannot be put into such tables.
    """
    palettizer = Palettizer(cfg)
    errors = palettizer.distortions(name, weight, importance(statistics, Weighting.LOSS), choices)
    return [
        Option(bits, palettizer.nbytes(weight.shape, bits), error / 2)
        for bits, error in zip(choices, errors, strict=True)
    ]
