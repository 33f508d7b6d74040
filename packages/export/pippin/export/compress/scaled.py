"""Weights as integers times a scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pippin.core.errors import QuantizationError
from pippin.core.quantized_array import Scaled
from pippin.export.compress.config import ScaleConfig
from pippin.export.compress.palettize import Importance, require_float16

# Of the largest number in a block: with few levels, a finer step for the others is worth more than the largest.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# Of scales: a chip may take smaller numbers of float16 for zero.
_SMALLEST = float(np.finfo(np.float16).smallest_normal)


def require_blocks(
    name: str, shape: Sequence[int], cfg: ScaleConfig, *, rows: bool = False, path: str = "linear"
) -> None:
    """Raises QuantizationError unless a weight splits into the blocks that share a scale; see `Scaler.compress`.

    `path` is the config's in its recipe.
    """
    along = shape[-1 if rows else -2]
    if cfg.block_size is not None and along % cfg.block_size:
        raise QuantizationError(
            f"{name} is {list(shape)}, whose dim of {along} does not split into blocks of {cfg.block_size}. Take a recipe "
            f"without blocks, such as int8, or compress with a block_size that divides {along}: //packages/export:compress "
            f"--set {path}.block_size=N."
        )


class Scaler:
    """Rounds weights to multiples of a scale of each block."""

    Config = ScaleConfig

    def __init__(self, cfg: ScaleConfig):
        self._cfg = cfg

    def compress(
        self, name: str, weight: np.ndarray, importance: Importance | None = None, *, rows: bool = False
    ) -> Scaled:
        """A weight in integers.

        Args:
            name: of the weight, for errors.
            weight: [..., I, O] of finite numbers: a scale is of the inputs of an output, or of a block of these.
            importance: of its errors: of several scales for 4 bits, the one is taken that is best by it.
            rows: the weight is an embedding, [V, D]: a scale is of a row, or of a block of it.

        Raises:
            QuantizationError: blocks do not fit the weight, or float16 does not hold its numbers.
        """
        require_float16(name, weight)
        require_blocks(name, weight.shape, self._cfg, rows=rows)
        axis = weight.ndim - (1 if rows else 2)  # that is summed over
        size = self._cfg.block_size or weight.shape[axis]
        most = 2 ** (self._cfg.bits - 1) - 1
        cut = weight.shape[:axis] + (weight.shape[axis] // size, size) + weight.shape[axis + 1 :]
        blocks = weight.astype(np.float32).reshape(cut)
        largest = np.abs(blocks).max(axis=axis + 1, keepdims=True)
        counts = None
        if importance is not None and not rows:
            counts = np.broadcast_to(importance.inputs[..., None], weight.shape).reshape(cut)
        best = best_error = None
        for shrink in _SHRINK if self._cfg.bits == 4 else _SHRINK[:1]:
            scales = np.maximum(largest * np.float32(shrink / most), _SMALLEST).astype(np.float16)
            step = scales.astype(np.float32)
            values = np.clip(np.rint(blocks / step), -most - 1, most)
            error = np.square(values * step - blocks)
            error = (error if counts is None else error * counts).sum(axis=axis + 1, keepdims=True)
            if best is None or best_error is None:
                best, best_error = (values, scales), error
                continue
            better = error < best_error
            best = np.where(better, values, best[0]), np.where(better, scales, best[1])
            best_error = np.minimum(error, best_error)
        assert best is not None
        values, scales = best
        return Scaled(values.astype(np.int8).reshape(weight.shape), scales.squeeze(axis + 1), self._cfg.bits)
