"""Lowering: a model's component tree as a program for Core ML of iOS 18, written op by op.

Two functions over one pair of states: `prefill` reads several tokens of a prompt at a time, `decode` one. All shapes are
fixed; each state is read once and written once, whole. Import it late: see `coreml_tools`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pippin.core.quantized_array import QuantizedArray
from pippin.export import lower_attention, lower_linear, lower_model  # noqa: F401  they declare the rules
from pippin.export.adapter_layout import adapter_layout
from pippin.export.coreml_tools import Builder as mb
from pippin.export.coreml_tools import ct, mil, types
from pippin.export.lower_emitter import Emitter, require_rules
from pippin.export.lower_weights import Weights
from pippin.export.program_sizes import FUNCTIONS, STATES, Sizes, cache_shape
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

TARGET = ct.target.iOS18


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program, and what its manifest says of it."""

    program: mil.Program
    functions: tuple[pb.ExportedFunction, ...]
    weights: tuple[pb.ExportedWeight, ...]
    adapter: pb.AdapterLayout | None


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
    cache = cache_shape(cfg, sizes.context_length)
    layout = None
    if sizes.adapter_rank:
        shapes = {name: tuple(values.shape) for name, values in params.items()}
        layout = adapter_layout(shapes, sizes.adapter_rank, base_signature)
    weights = Weights(params)
    program = mil.Program()
    mb.name_count.clear()  # names of ops count from the last program on otherwise
    described = []
    for name, tokens in zip(FUNCTIONS, (sizes.prefill_length, 1), strict=True):
        progress(name)
        inputs = _inputs(tokens, sizes.context_length, cache, layout)
        program.add_function(name, _function(cfg, weights, inputs, tokens, sizes.context_length, layout))
        described.append(_described(name, inputs, (1, tokens, cfg.vocab_size)))
    program.default_function_name = FUNCTIONS[0]
    program.export_as_multifunction = True
    program.skip_all_passes = True  # it is as it is to be
    return Lowered(program, tuple(described), tuple(weights.manifest()), layout)


def _inputs(
    tokens: int, context: int, cache: tuple[int, ...], layout: pb.AdapterLayout | None
) -> dict[str, mil.Placeholder]:
    inputs = {
        "inputIds": mb.TensorSpec((1, tokens), types.int32),
        "position": mb.TensorSpec((1,), types.int32),
        "causalMask": mb.TensorSpec((1, 1, tokens, context), types.fp16),
    }
    if layout is not None:
        inputs["adapter"] = mb.TensorSpec((layout.length,), types.fp16)
    states = {name: mb.StateTensorSpec(cache, types.fp16) for name in STATES}
    return inputs | states


def _function(
    cfg: CausalLMConfig,
    weights: Weights,
    inputs: dict[str, mil.Placeholder],
    tokens: int,
    context: int,
    layout: pb.AdapterLayout | None,
) -> mil.Function:
    slots = {} if layout is None else {s.name: (s.offset, tuple(s.shape)) for s in layout.slots}
    with mil.Function(inputs, opset_version=TARGET) as function:
        emitter = Emitter(weights, dict(function.inputs), tokens=tokens, context=context, adapter_slots=slots)
        logits = emitter.emit(cfg, "", emitter.ids)
        logits.set_name("logits")
        function.set_outputs([logits])
    return function


def _described(name: str, inputs: dict[str, mil.Placeholder], logits: tuple[int, ...]) -> pb.ExportedFunction:
    function = pb.ExportedFunction(name=name)
    for key, spec in inputs.items():
        dtype = "int32" if spec.dtype is types.int32 else "float16"
        (function.states if key in STATES else function.inputs).add(
            name=key, dtype=dtype, shape=spec.sym_shape
        )
    function.outputs.add(name="logits", dtype="float16", shape=logits)
    return function
