"""What a program takes, keeps and gives, the same whichever runtime it is for, and what its manifest says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pippin.core.quantized_array import QuantizedArray
from pippin.export.adapter_layout import adapter_layout
from pippin.export.program_sizes import FUNCTIONS, STATES, Sizes, cache_shape
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Interface:
    """The functions of a program from outside."""

    functions: tuple[pb.ExportedFunction, ...]
    adapter: pb.AdapterLayout | None  # None: the program takes no adapter

    @property
    def adapter_slots(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name of a matrix -> where it lies in the input `adapter`, and its shape."""
        slots = () if self.adapter is None else self.adapter.slots
        return {slot.name: (slot.offset, tuple(slot.shape)) for slot in slots}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program, and what its manifest says of it."""

    program: Any  # of the library that writes it
    functions: tuple[pb.ExportedFunction, ...]
    weights: tuple[pb.ExportedWeight, ...]
    adapter: pb.AdapterLayout | None


def program_interface(
    cfg: CausalLMConfig,
    params: Mapping[str, np.ndarray | QuantizedArray],
    sizes: Sizes,
    base_signature: str,
) -> Interface:
    """The functions of a model's program from outside.

    Args:
        cfg: of the model without stacks.
        params: its parameters by name.
        sizes: of the program.
        base_signature: of the model that adapters must have been trained on.

    Raises:
        ConfigError: layers have caches of different sizes.
    """
    layout = None
    if sizes.adapter_rank:
        shapes = {name: tuple(values.shape) for name, values in params.items()}
        layout = adapter_layout(shapes, sizes.adapter_rank, base_signature)
    cache = cache_shape(cfg, sizes.context_length)
    functions = []
    for name, tokens in zip(FUNCTIONS, (sizes.prefill_length, 1), strict=True):
        function = pb.ExportedFunction(name=name)
        function.inputs.add(name="inputIds", dtype="int32", shape=(1, tokens))
        function.inputs.add(name="position", dtype="int32", shape=(1,))
        function.inputs.add(name="causalMask", dtype="float16", shape=(1, 1, tokens, sizes.context_length))
        if layout is not None:
            function.inputs.add(name="adapter", dtype="float16", shape=(layout.length,))
        for state in STATES:
            function.states.add(name=state, dtype="float16", shape=cache)
        function.outputs.add(name="logits", dtype="float16", shape=(1, tokens, cfg.vocab_size))
        functions.append(function)
    return Interface(tuple(functions), layout)
