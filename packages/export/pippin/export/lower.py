"""Lowering: a model's component tree as a program for Core ML of iOS 18, written op by op.

Two functions over one pair of states: `prefill` reads several tokens of a prompt at a time, `decode` one. All shapes are
fixed; each state is read once and written once, whole. Import it late: see `coreml_tools`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError
from pippin.core.quantized_array import QuantizedArray
from pippin.export import lower_attention, lower_linear, lower_model  # noqa: F401  they declare the rules
from pippin.export.adapter_layout import adapter_layout
from pippin.export.coreml_tools import Builder as mb
from pippin.export.coreml_tools import ct, mil, types
from pippin.export.lower_emitter import Emitter, require_rules
from pippin.export.lower_weights import Weights
from pippin.layers.attention_config import GroupedQueryAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

TARGET = ct.target.iOS18
FUNCTIONS = ("prefill", "decode")
STATES = ("keyCache", "valueCache")

_CONTEXT_STEP = 32  # the neural engine wants dims of states in multiples of it


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The fixed sizes of a program.

    Raises:
        ConfigError: they do not fit each other.
    """

    context_length: int = 512  # slots of the caches
    prefill_length: int = 64  # tokens that a call of `prefill` reads
    adapter_rank: int = 0  # of the largest adapter that fits; 0: the program takes none

    def __post_init__(self) -> None:
        if self.context_length < _CONTEXT_STEP or self.context_length % _CONTEXT_STEP:
            raise ConfigError(
                f"the context is {self.context_length} tokens; it must be a multiple of {_CONTEXT_STEP}, since the neural "
                f"engine takes no other states. Use {-(-max(self.context_length, 1) // _CONTEXT_STEP) * _CONTEXT_STEP}."
            )
        if not 1 < self.prefill_length <= self.context_length:
            raise ConfigError(
                f"prefill reads {self.prefill_length} tokens at a time; it must be from 2 to the {self.context_length} of "
                "the context. 64 is a good number for most models."
            )
        if self.adapter_rank < 0:
            raise ConfigError(f"the adapter rank is {self.adapter_rank}; it must be 0, for none, or more.")


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
    cache = _cache_shape(cfg, sizes.context_length)
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


def _cache_shape(cfg: CausalLMConfig, context: int) -> tuple[int, ...]:
    """Of a state: float16 [layers with a cache, 1, K, S, H]."""
    caching = {path: child for path, child in traverse(cfg) if isinstance(child, GroupedQueryAttentionConfig)}
    shapes = {(child.num_kv_heads, child.head_dim) for child in caching.values()}
    if len(shapes) != 1:
        what = " and ".join(f"{heads} heads of {dim}" for heads, dim in sorted(shapes)) or "none"
        raise ConfigError(
            f"the layers keep keys and values of {what}; a package has one cache for all, so that they must be alike. Give "
            "all layers the same num_kv_heads and head_dim."
        )
    heads, head_dim = shapes.pop()
    return len(caching), 1, heads, context, head_dim


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
