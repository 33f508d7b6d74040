"""Rules of feed-forwards, layers, stacks and the model."""

from __future__ import annotations

from pippin.export.coreml_tools import Builder as mb
from pippin.export.lower_emitter import Emitter, Var, rule, scalar
from pippin.export.lower_linear import product
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.stack_config import (
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)


@rule(FeedForwardConfig)
def _feed_forward(e: Emitter, cfg: FeedForwardConfig, path: str, x: Var) -> Var:
    gate = e.emit(cfg.gate_proj, f"{path}.gate_proj", x)
    match cfg.activation:
        case Activation.SILU:
            gate = mb.silu(x=gate)
        case Activation.GELU:
            gate = mb.gelu(x=gate, mode="TANH_APPROXIMATION")
        case Activation.RELU:
            gate = mb.relu(x=gate)
    hidden = mb.mul(x=gate, y=e.emit(cfg.up_proj, f"{path}.up_proj", x))
    return e.emit(cfg.down_proj, f"{path}.down_proj", hidden)


@rule(TransformerLayerConfig)
def _transformer_layer(e: Emitter, cfg: TransformerLayerConfig, path: str, x: Var) -> Var:
    attended = e.emit(cfg.attention, f"{path}.attention", e.emit(cfg.norm, f"{path}.attention_norm", x))
    x = e.residual(x, attended)
    hidden = e.emit(
        cfg.feed_forward, f"{path}.feed_forward", e.emit(cfg.norm, f"{path}.feed_forward_norm", x)
    )
    return e.residual(x, hidden)


# The other stacks are sequences by the time that a model is written: see pippin.layers.unrolled.
@rule(SequenceConfig, RepeatConfig, SharedKVStackConfig)
def _sequence(e: Emitter, cfg: SequenceConfig, path: str, x: Var) -> Var:
    for i, layer in enumerate(cfg.layers):
        x = e.emit(layer, f"{path}.layers.{i}", x)
    return x


@rule(CausalLMConfig)
def _causal_lm(e: Emitter, cfg: CausalLMConfig, path: str, ids: Var) -> Var:
    x = e.emit(cfg.embedding, "embedding", ids)
    x = e.emit(cfg.decoder, "decoder", x)
    e.write_caches()
    x = e.emit(cfg.norm, "norm", x)
    if cfg.head is None:
        logits = product(e, x, "embedding.weight", transposed=False)
    else:
        logits = e.emit(cfg.head, "head", x)
    cap = cfg.logit_soft_cap
    if cap is None:
        return logits
    return mb.mul(x=mb.tanh(x=mb.mul(x=logits, y=scalar(1 / cap))), y=scalar(cap))
