"""Lowering for Core AI: a model's component tree as a program of Apple's own dialect, written op by op.

The functions, inputs, states and outputs are those of the Core ML program. Import it late: see `coreai_tools`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pippin.core.quantized_array import QuantizedArray
from pippin.export import coreai_attention, coreai_layers  # noqa: F401  they declare the rules
from pippin.export.coreai_emitter import Emitter, require_rules, reshaped
from pippin.export.coreai_tools import AIProgram, Function, Module, TensorType, ops
from pippin.export.coreai_weights import Weights
from pippin.export.program_sizes import FUNCTIONS, STATES, Sizes, cache_shape
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb


@dataclasses.dataclass(frozen=True)
class LoweredCoreAI:
    """A program, and what its manifest says of it."""

    program: AIProgram
    functions: tuple[pb.ExportedFunction, ...]
    weights: tuple[pb.ExportedWeight, ...]


def lower_coreai(
    cfg: CausalLMConfig,
    params: Mapping[str, np.ndarray | QuantizedArray],
    sizes: Sizes,
    *,
    dtype: type = np.float16,
    progress: Callable[[str], None] = lambda what: None,
) -> LoweredCoreAI:
    """The program of a model.

    Args:
        cfg: of the model without stacks: see `pippin.layers.unrolled`.
        params: its parameters by name. What is not quantised is stored as float16.
        sizes: of the program.
        dtype: that is computed in, np.float16 or np.float32. Weights, states and logits are float16 either way.
        progress: is told which function is written.

    Raises:
        ConfigError: a component has no rule, or layers have caches of different sizes.
        CheckpointError: a weight is absent, or no finite number of float16.
    """
    require_rules(cfg)
    cache = cache_shape(cfg, sizes.context_length)
    module = Module.create()
    described = []
    with module:
        weights = Weights(params)
        for name, tokens in zip(FUNCTIONS, (sizes.prefill_length, 1), strict=True):
            progress(name)
            inputs = {
                "inputIds": TensorType((1, tokens), np.int32),
                "position": TensorType((1,), np.int32),
                "causalMask": TensorType((1, 1, tokens, sizes.context_length), np.float16),
            }
            states = {state: TensorType(cache, np.float16) for state in STATES}
            outputs = {"logits": TensorType((1, tokens, cfg.vocab_size), np.float16)}
            function = Function(name, inputs, states, outputs)
            with function.body():
                emitter = Emitter(weights, function, tokens=tokens, context=sizes.context_length, dtype=dtype)
                logits = reshaped(emitter.emit(cfg, "", emitter.ids), [1, tokens, cfg.vocab_size])
                function.end([logits if dtype is np.float16 else ops.cast(logits, np.float16)])
            described.append(_described(name, tokens, cache, sizes.context_length, cfg.vocab_size))
    return LoweredCoreAI(AIProgram(module), tuple(described), tuple(weights.manifest()))


def _described(
    name: str, tokens: int, cache: tuple[int, ...], context: int, vocab_size: int
) -> pb.ExportedFunction:
    function = pb.ExportedFunction(name=name)
    function.inputs.add(name="inputIds", dtype="int32", shape=(1, tokens))
    function.inputs.add(name="position", dtype="int32", shape=(1,))
    function.inputs.add(name="causalMask", dtype="float16", shape=(1, 1, tokens, context))
    for state in STATES:
        function.states.add(name=state, dtype="float16", shape=cache)
    function.outputs.add(name="logits", dtype="float16", shape=(1, tokens, vocab_size))
    return function
