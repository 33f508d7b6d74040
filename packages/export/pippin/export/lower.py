"""Lowering: a model's component tree as a program for Core ML of iOS 18, written op by op.

Two functions over one pair of states: `prefill` reads several tokens of a prompt at a time, `decode` one. All shapes are
fixed; each state is read once and written once, whole. Import it late: see `coreml_tools`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pippin.core.quantized_array import QuantizedArray
from pippin.export import lower_attention, lower_linear, lower_model  # noqa: F401  they declare the rules
from pippin.export.coreml_tools import Builder as mb
from pippin.export.coreml_tools import ct, mil, types
from pippin.export.lower_emitter import Emitter, require_rules
from pippin.export.lower_weights import Weights
from pippin.export.program_interface import Lowered, program_interface
from pippin.export.program_sizes import FUNCTIONS, Sizes
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

TARGET = ct.target.iOS18

_TYPES = {"int32": types.int32, "float16": types.fp16}


def lower(
    cfg: CausalLMConfig,
    params: Mapping[str, np.ndarray | QuantizedArray],
    sizes: Sizes,
    *,
    base_signature: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> Lowered:
    """The program of a model.

    Args:
        cfg: of the model without stacks: see `pippin.layers.unrolled`.
        params: its parameters by name. What is not quantised is stored as float16.
        sizes: of the program.
        base_signature: of the model that adapters must have been trained on.
        progress: is told which function is written.

    Raises:
        ConfigError: a component has no rule, or layers have caches of different sizes.
        CheckpointError: a weight is absent, or no finite number of float16.
    """
    require_rules(cfg)
    interface = program_interface(cfg, params, sizes, base_signature)
    weights = Weights(params)
    program = mil.Program()
    mb.name_count.clear()  # names of ops count from the last program on otherwise
    for described in interface.functions:
        progress(described.name)
        program.add_function(described.name, _function(cfg, weights, described, interface.adapter_slots))
    program.default_function_name = FUNCTIONS[0]
    program.export_as_multifunction = True
    program.skip_all_passes = True  # it is as it is to be
    return Lowered(program, interface.functions, tuple(weights.manifest()), interface.adapter)


def _function(
    cfg: CausalLMConfig,
    weights: Weights,
    described: pb.ExportedFunction,
    slots: dict[str, tuple[int, tuple[int, ...]]],
) -> mil.Function:
    inputs = {t.name: mb.TensorSpec(tuple(t.shape), _TYPES[t.dtype]) for t in described.inputs}
    states = {t.name: mb.StateTensorSpec(tuple(t.shape), _TYPES[t.dtype]) for t in described.states}
    *_, tokens, context = inputs["causalMask"].sym_shape
    with mil.Function(inputs | states, opset_version=TARGET) as function:
        emitter = Emitter(weights, dict(function.inputs), tokens=tokens, context=context, adapter_slots=slots)
        logits = emitter.emit(cfg, "", emitter.ids)
        logits.set_name("logits")
        function.set_outputs([logits])
    return function
