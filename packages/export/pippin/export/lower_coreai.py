"""Lowering for Core AI: a model's component tree as a program of Apple's own dialect, written op by op.

The functions, inputs, states and outputs are those of the Core ML program. Import it late: see `coreai_tools`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pippin.core.quantized_array import QuantizedArray
from pippin.export import coreai_attention, coreai_layers  # noqa: F401  they declare the rules
from pippin.export.coreai_emitter import Emitter, require_rules, reshaped
from pippin.export.coreai_tools import AIProgram, Function, Module, TensorType, ops
from pippin.export.coreai_weights import Weights
from pippin.export.program_interface import Lowered, program_interface
from pippin.export.program_sizes import Sizes
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

_TYPES = {"int32": np.int32, "float16": np.float16}


def lower_coreai(
    cfg: CausalLMConfig,
    params: Mapping[str, np.ndarray | QuantizedArray],
    sizes: Sizes,
    *,
    dtype: type = np.float16,
    base_signature: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> Lowered:
    """The program of a model.

    Args:
        cfg: of the model without stacks: see `pippin.layers.unrolled`.
        params: its parameters by name. What is not quantised is stored as float16.
        sizes: of the program.
        dtype: that is computed in, np.float16 or np.float32. Weights, states and logits are float16 either way.
        base_signature: of the model that adapters must have been trained on.
        progress: is told which function is written.

    Raises:
        ConfigError: a component has no rule, or layers have caches of different sizes.
        CheckpointError: a weight is absent, or no finite number of float16.
    """
    require_rules(cfg)
    interface = program_interface(cfg, params, sizes, base_signature)
    module = Module.create()
    with module:
        weights = Weights(params)
        for described in interface.functions:
            progress(described.name)
            _write(cfg, weights, described, interface.adapter_slots, dtype)
    return Lowered(AIProgram(module), interface.functions, tuple(weights.manifest()), interface.adapter)


def _write(
    cfg: CausalLMConfig,
    weights: Weights,
    described: pb.ExportedFunction,
    slots: dict[str, tuple[int, tuple[int, ...]]],
    dtype: type,
) -> None:
    """Writes a function into the module that is open."""
    inputs, states, outputs = map(_types, (described.inputs, described.states, described.outputs))
    *_, tokens, context = next(tensor.shape for tensor in described.inputs if tensor.name == "causalMask")
    function = Function(described.name, inputs, states, outputs)
    with function.body():
        emitter = Emitter(weights, function, tokens=tokens, context=context, dtype=dtype, adapter_slots=slots)
        logits = reshaped(emitter.emit(cfg, "", emitter.ids), [1, tokens, cfg.vocab_size])
        function.end([logits if dtype is np.float16 else ops.cast(logits, np.float16)])


def _types(tensors: Iterable[pb.ExportedTensor]) -> dict[str, TensorType]:
    return {tensor.name: TensorType(tuple(tensor.shape), _TYPES[tensor.dtype]) for tensor in tensors}
