"""Weights as entries of lookup tables, of which groups of columns or rows have one each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pippin.core.errors import QuantizationError
from pippin.core.quantized_array import Palettized
from pippin.export.compress import clusters
from pippin.export.compress.config import GroupAxis, PaletteConfig
from pippin.export.stored_weights import SOUND_WEIGHTS

_CHUNK = 1 << 20  # weights that are worked on at a time, on each core
_MOST_COUNTED = 6  # bits
_MOST_GROUPS = 32  # of a chunk: the tables of more would not stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much the square of an error in weight [..., i, j] counts: `inputs[..., i] * outputs[..., j]`."""

    inputs: np.ndarray  # [..., I]
    outputs: np.ndarray  # [..., O]


class Palettizer:
    """Replaces weights by the centres of clusters, each group's own. The result depends on nothing but its arguments."""

    Config = PaletteConfig

    def __init__(self, cfg: PaletteConfig):
        self._cfg = cfg

    def compress(self, name: str, weight: np.ndarray, importance: Importance | None = None) -> Palettized:
        """A weight in tables.

        Args:
            name: of the weight, for errors.
            weight: [..., I, O] of finite numbers; each [I, O] has tables of its own.
            importance: of its errors; None: all alike.

        Raises:
            QuantizationError: groups do not fit the weight, or float16 does not hold its numbers.
        """
        cut = _Cut.of(name, weight, importance, self._cfg)
        bits = self._cfg.bits
        luts = np.empty((cut.stack, cut.groups, 2**bits), np.float16)
        indices = np.empty((cut.stack, *weight.shape[-2:]), np.uint8)

        def visit(part: _Part) -> None:
            values = cut.values(part)
            found = clusters.histograms(values, cut.weights(part))
            tables = clusters.centres(found, 2**bits).astype(np.float16)
            luts[part.matrix, part.start : part.stop] = tables
            chosen = np.stack([clusters.nearest(v, t) for v, t in zip(values, tables, strict=True)])
            cut.put(indices, part, chosen)

        _on_all_cores(visit, cut.parts())
        grid = (1, cut.groups) if self._cfg.axis is GroupAxis.OUTPUTS else (cut.groups, 1)
        leading = weight.shape[:-2]
        return Palettized(indices.reshape(weight.shape), luts.reshape(*leading, *grid, 2**bits), bits)

    def distortions(
        self, name: str, weight: np.ndarray, importance: Importance | None, choices: Sequence[int]
    ) -> list[float]:
        """The sum over all weights of importance times the square of the error, for each number of bits.

        Of float32 tables: rounding to float16 adds next to nothing. Beyond 6 bits, each bit more is taken to quarter the sum.

        Args:
            name: of the weight, for errors.
            weight: as for `compress`.
            importance: as for `compress`.
            choices: the numbers of bits.
        """
        cut = _Cut.of(name, weight, importance, self._cfg)

        def visit(part: _Part) -> np.ndarray:
            found = clusters.histograms(cut.values(part), cut.weights(part))
            counted = sorted({min(bits, _MOST_COUNTED) for bits in choices})
            sums = {b: clusters.distortion(found, clusters.centres(found, 2**b)).sum() for b in counted}
            return np.array([sums[min(b, _MOST_COUNTED)] / 4 ** max(b - _MOST_COUNTED, 0) for b in choices])

        return np.sum(_on_all_cores(visit, cut.parts()), axis=0).tolist()

    def nbytes(self, shape: Sequence[int], bits: int) -> int:
        """What a weight of such a shape takes."""
        count, size = int(np.prod(shape)), self._cfg.group_size
        along = shape[-1] if self._cfg.axis is GroupAxis.OUTPUTS else shape[-2]
        groups = int(np.prod(shape[:-2])) * (along // size)
        return (count * bits + 7) // 8 + groups * 2**bits * 2


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some groups of one matrix of a stack."""

    matrix: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A weight, cut into groups."""

    weight: np.ndarray  # [stack, I, O]
    inputs: np.ndarray | None  # [stack, I]
    outputs: np.ndarray | None  # [stack, O]
    size: int
    of_outputs: bool

    @classmethod
    def of(cls, name: str, weight: np.ndarray, importance: Importance | None, cfg: PaletteConfig) -> _Cut:
        require_float16(name, weight)
        require_groups(name, weight.shape, cfg)
        of_outputs = cfg.axis is GroupAxis.OUTPUTS
        *_, rows, columns = weight.shape
        return cls(
            weight.reshape(-1, rows, columns),
            None if importance is None else importance.inputs.reshape(-1, rows),
            None if importance is None else importance.outputs.reshape(-1, columns),
            cfg.group_size,
            of_outputs,
        )

    @property
    def stack(self) -> int:
        return self.weight.shape[0]

    @property
    def groups(self) -> int:
        return self.weight.shape[2 if self.of_outputs else 1] // self.size

    def parts(self) -> list[_Part]:
        of_group = self.weight[0].size // self.groups
        step = max(1, min(_MOST_GROUPS, _CHUNK // of_group))
        return [
            _Part(matrix, start, min(start + step, self.groups))
            for matrix in range(self.stack)
            for start in range(0, self.groups, step)
        ]

    def values(self, part: _Part) -> np.ndarray:
        """The weights of a part's groups: float32 [groups, n]."""
        return self._rows(self._block(self.weight, part)).astype(np.float32)

    def weights(self, part: _Part) -> np.ndarray | None:
        """The importances of a part's groups: [groups, n]."""
        if self.inputs is None or self.outputs is None:
            return None
        inputs, outputs = self.inputs[part.matrix][:, None], self.outputs[part.matrix][None]
        block = slice(part.start * self.size, part.stop * self.size)
        return self._rows(inputs * outputs[:, block] if self.of_outputs else inputs[block] * outputs)

    def put(self, target: np.ndarray, part: _Part, rows: np.ndarray) -> None:
        """Writes what belongs to a part's groups, [groups, n], to its place in [stack, I, O]."""
        block = self._block(target, part)
        if self.of_outputs:
            block[...] = (
                rows.reshape(part.stop - part.start, -1, self.size).transpose(1, 0, 2).reshape(block.shape)
            )
        else:
            block[...] = rows.reshape(block.shape)

    def _block(self, array: np.ndarray, part: _Part) -> np.ndarray:
        along = slice(part.start * self.size, part.stop * self.size)
        return array[part.matrix][:, along] if self.of_outputs else array[part.matrix][along]

    def _rows(self, block: np.ndarray) -> np.ndarray:
        if not self.of_outputs:
            return block.reshape(block.shape[0] // self.size, -1)
        groups = block.shape[1] // self.size
        return block.reshape(-1, groups, self.size).transpose(1, 0, 2).reshape(groups, -1)


def require_groups(name: str, shape: Sequence[int], cfg: PaletteConfig, path: str = "linear") -> None:
    """Raises QuantizationError unless a weight splits into the groups that share tables; `path` is the config's in its recipe."""
    along = shape[-1] if cfg.axis is GroupAxis.OUTPUTS else shape[-2]
    if along % cfg.group_size:
        raise QuantizationError(
            f"{name} is {list(shape)}, whose {cfg.axis.value} ({along}) do not split into groups of {cfg.group_size}. Take a "
            f"recipe without groups, such as int8, or compress with a group_size that divides {along} or along the other axis: "
            f"//packages/export:compress --set {path}.group_size=N, or {path}.axis."
        )


def require_float16(name: str, weight: np.ndarray) -> None:
    """Raises QuantizationError unless float16 holds all numbers of a weight."""
    most = float(np.finfo(np.float16).max)
    low, high = float(weight.min()), float(weight.max())
    if not (-most <= low and high <= most):  # NaN is neither
        got = f"numbers from {low} to {high}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise QuantizationError(
            f"{name} holds {got}; what is exported is finite in float16, {most} at most. {SOUND_WEIGHTS}"
        )


def _on_all_cores[T, R](visit: Callable[[T], R], parts: Iterable[T]) -> list[R]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(visit, parts))
