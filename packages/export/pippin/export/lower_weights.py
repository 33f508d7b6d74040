"""Weights in the form in which a program stores them: once, however many functions read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from pippin.core.errors import CheckpointError
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.export.coreml_tools import nptype_from_builtin, string_to_builtin
from pippin.export.stored_weights import as_float16, described
from pippin.v1 import export_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Dense:
    """Weights as they are."""

    values: np.ndarray  # float16


@dataclasses.dataclass(frozen=True)
class Table:
    """Weights that `constexpr_lut_to_dense` makes."""

    indices: np.ndarray  # uint1 to uint8
    lut: np.ndarray  # float16 [*groups, entries, 1]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Weights that `constexpr_blockwise_shift_scale` makes."""

    data: np.ndarray  # int4 or int8
    scale: np.ndarray  # float16 [*blocks]


class Weights:
    """The parameters of a model, by name, as constants of a program."""

    def __init__(self, params: Mapping[str, np.ndarray | QuantizedArray]):
        self._params = params
        self._stored: dict[str, Dense | Table | Blocks] = {}
        self._outputs_first: dict[str, bool] = {}
        self._constants: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._params

    def stored(self, name: str, *, transposed: bool) -> Dense | Table | Blocks:
        """A weight as constants. Every reader of a weight wants it the same way round, so that one blob serves all.

        Raises:
            CheckpointError: there is no such weight, or a value is no finite number of float16.
        """
        if name not in self._params:
            raise CheckpointError(
                f"the model has no weight {name}, which its component needs. Open the model that the weights are of."
            )
        if name not in self._stored:
            self._stored[name] = _stored(name, self._params[name], transposed)
            self._outputs_first[name] = transposed
        assert self._outputs_first[name] == transposed, name
        return self._stored[name]

    def constant(self, name: str, values: np.ndarray) -> np.ndarray:
        """Numbers that are no weights, the same under one name in all functions."""
        assert np.array_equal(self._constants.setdefault(name, values), values), name
        return self._constants[name]

    def manifest(self) -> list[pb.ExportedWeight]:
        """What was stored, sorted by name."""
        return [described(name, self._params[name]) for name in sorted(self._stored)]


def _stored(name: str, values: np.ndarray | QuantizedArray, transposed: bool) -> Dense | Table | Blocks:
    def turned(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.T if transposed else array)

    match values:
        case Palettized():
            # Groups along [inputs, outputs] turn with the weights; the entries of a table stay behind them.
            groups = values.luts.swapaxes(0, 1) if transposed else values.luts
            lut = np.ascontiguousarray(groups)[..., None]
            return Table(_of_type(turned(values.indices), f"uint{values.bits}"), lut)
        case Scaled():
            return Blocks(_of_type(turned(values.values), f"int{values.bits}"), turned(values.scales))
        case _:
            return Dense(turned(as_float16(name, values)))


def _of_type(values: np.ndarray, name: str) -> np.ndarray:
    """The same integers under the type by which coremltools knows how many bits they take."""
    return values.astype(nptype_from_builtin(string_to_builtin(name)))
