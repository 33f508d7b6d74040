"""Weights in Core AI's own compressed forms, straight from our arrays. Import it late: see `coreai_tools`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pippin.core.errors import CheckpointError
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.export.coreai_tools import Constants, Value, ops
from pippin.export.stored_weights import as_float16, described
from pippin.v1 import export_pb2 as pb


class Weights:
    """The parameters of a model, by name, as constants of a module: [inputs, outputs], as they are."""

    def __init__(self, params: Mapping[str, np.ndarray | QuantizedArray]):
        self._params = params
        self._constants = Constants()
        self._read: set[str] = set()

    def raw(self, name: str) -> np.ndarray | QuantizedArray:
        """A weight as the model has it.

        Raises:
            CheckpointError: there is no such weight.
        """
        if name not in self._params:
            raise CheckpointError(
                f"the model has no weight {name}, which its component needs. Open the model that the weights are of."
            )
        self._read.add(name)
        return self._params[name]

    def constant(self, name: str, values: np.ndarray, bits: int | None = None) -> Value:
        """Numbers as they are, in the function that is written; of integers, so many bits."""
        return self._constants.value(name, values, bits)

    def dense(self, name: str) -> Value:
        """A weight as float16, in the function that is written.

        Raises:
            CheckpointError: there is no such weight, or a value is no finite number of float16.
        """
        match self.raw(name):
            case Palettized() as table:
                return self._from_table(name, table)
            case Scaled() as scaled:
                scale = self.constant(f"{name}.scales", scaled.scales)
                values = self.constant(f"{name}.values", scaled.values, scaled.bits)
                return self.rescaled(values, scale, scaled)
            case values:
                return self.constant(name, as_float16(name, np.asarray(values)))

    def rescaled(self, values: Value, scale: Value, scaled: Scaled) -> Value:
        """Integers times their scales: float16."""
        shape = tuple(scale.type.shape)
        zeros = "x".join(map(str, shape))
        no_shift = self.constant(f"zeros_{scaled.bits}_{zeros}", np.zeros(shape, np.int8), scaled.bits)
        no_bias = self.constant(f"zeros_16_{zeros}", np.zeros(shape, np.float16))
        return ops.blockwise_shift_scale(values, scale, no_shift, no_bias)

    def manifest(self) -> list[pb.ExportedWeight]:
        """What was stored, sorted by name."""
        return [described(name, self._params[name]) for name in sorted(self._read)]

    def _from_table(self, name: str, table: Palettized) -> Value:
        return ops.lut_to_dense(
            self.constant(f"{name}.indices", table.indices, table.bits),
            self.constant(f"{name}.luts", table.luts[..., None]),
            np.array(0, np.int16),  # along which vectors would be laid; entries are numbers
        )
