"""Rules of linear maps, embeddings, norms, layers and the model, for Core AI. Import it late: see `coreai_tools`."""

from __future__ import annotations

import numpy as np

from pippin.core.quantized_array import Scaled
from pippin.export.coreai_emitter import Emitter, reshaped, rule, transposed
from pippin.export.coreai_tools import Value, ops
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig, LoRALinearConfig, QuantizedLinearConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.stack_config import (
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)


# Weights that are multiplied as 8-bit numbers in training are the same weights.
@rule(LinearConfig, QuantizedLinearConfig)
def _linear(e: Emitter, cfg: LinearConfig, path: str, x: Value) -> Value:
    y = ops.batch_matmul(x, e.weight(f"{path}.weight"))
    if cfg.bias:
        y = ops.broadcasting_add(y, e.weight(f"{path}.bias"))
    added = e.low_rank(path, x)
    return y if added is None else ops.broadcasting_add(y, added)


@rule(LoRALinearConfig)
def _lora_linear(e: Emitter, cfg: LoRALinearConfig, path: str, x: Value) -> Value:
    low = ops.batch_matmul(ops.batch_matmul(x, e.weight(f"{path}.down")), e.weight(f"{path}.up"))
    if cfg.alpha != cfg.rank:
        low = ops.broadcasting_mul(low, e.number(cfg.alpha / cfg.rank))
    return ops.broadcasting_add(e.emit(cfg.base, f"{path}.base", x), low)


@rule(EmbeddingConfig)
def _embedding(e: Emitter, cfg: EmbeddingConfig, path: str, ids: Value) -> Value:
    name = f"{path}.weight"
    values = e.weights.raw(name)
    if isinstance(values, Scaled) and values.bits == 8 and values.blocks == (values.shape[0], 1):
        # The rows alone are made floats, and not the whole vocabulary.
        rows = ops.gather_nd(e.weights.constant(f"{name}.values", values.values), ids)
        scales = ops.gather_nd(e.weights.constant(f"{name}.scales", values.scales), ids)
        return e.computed(e.weights.rescaled(rows, scales, values))
    return e.computed(ops.gather_nd(e.once(f"{name} in float16", lambda: e.weights.dense(name)), ids))


@rule(RMSNormConfig)
def _rms_norm(e: Emitter, cfg: RMSNormConfig, path: str, x: Value) -> Value:
    # In float16 the square of 256 is infinite.
    wide = ops.cast(x, np.float32) if e.dtype is np.float16 else x
    last = len(x.type.shape) - 1
    squares = ops.reduce_mean(ops.broadcasting_mul(wide, wide), [last])
    eps = e.once(
        f"eps_{cfg.eps}", lambda: e.weights.constant(f"eps_{cfg.eps}", np.array(cfg.eps, np.float32))
    )
    normal = ops.broadcasting_mul(wide, ops.rsqrt(ops.broadcasting_add(squares, eps)))
    scale = e.weights.dense(f"{path}.scale")
    normal = ops.broadcasting_mul(normal, ops.cast(scale, np.float32))
    return ops.cast(normal, np.float16) if e.dtype is np.float16 else normal


@rule(FeedForwardConfig)
def _feed_forward(e: Emitter, cfg: FeedForwardConfig, path: str, x: Value) -> Value:
    gate = e.emit(cfg.gate_proj, f"{path}.gate_proj", x)
    match cfg.activation:
        case Activation.SILU:
            gate = ops.silu(gate)
        case Activation.GELU:
            gate = ops.gelu(gate, approximate="tanh")
        case Activation.RELU:
            gate = ops.relu(gate)
    hidden = ops.broadcasting_mul(gate, e.emit(cfg.up_proj, f"{path}.up_proj", x))
    return e.emit(cfg.down_proj, f"{path}.down_proj", hidden)


@rule(TransformerLayerConfig)
def _transformer_layer(e: Emitter, cfg: TransformerLayerConfig, path: str, x: Value) -> Value:
    attended = e.emit(cfg.attention, f"{path}.attention", e.emit(cfg.norm, f"{path}.attention_norm", x))
    x = ops.broadcasting_add(x, attended)
    normal = e.emit(cfg.norm, f"{path}.feed_forward_norm", x)
    return ops.broadcasting_add(x, e.emit(cfg.feed_forward, f"{path}.feed_forward", normal))


# The other stacks are sequences by the time that a model is written: see pippin.layers.unrolled.
@rule(SequenceConfig, RepeatConfig, SharedKVStackConfig)
def _sequence(e: Emitter, cfg: SequenceConfig, path: str, x: Value) -> Value:
    for i, layer in enumerate(cfg.layers):
        x = e.emit(layer, f"{path}.layers.{i}", x)
    return x


@rule(CausalLMConfig)
def _causal_lm(e: Emitter, cfg: CausalLMConfig, path: str, ids: Value) -> Value:
    """Logits: [T, V]."""
    x = e.emit(cfg.embedding, "embedding", ids)
    x = e.emit(cfg.decoder, "decoder", x)
    e.write_caches()
    x = e.emit(cfg.norm, "norm", x)
    if cfg.head is not None:
        logits = e.emit(cfg.head, "head", x)
    else:
        # The other way round, so that the few numbers of tokens are transposed and not the vocabulary's.
        columns = reshaped(x, [cfg.dim, 1]) if e.tokens == 1 else transposed(x, [1, 0])
        logits = transposed(ops.batch_matmul(e.weight("embedding.weight"), columns), [1, 0])
    if (cap := cfg.logit_soft_cap) is None:
        return logits
    return ops.broadcasting_mul(ops.tanh(ops.broadcasting_mul(logits, e.number(1 / cap))), e.number(cap))
