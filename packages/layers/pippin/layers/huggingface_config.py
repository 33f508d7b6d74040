"""config.json of Hugging Face models of the Llama family as config trees, and back. No JAX.

A feature that the tree cannot express, or config.json cannot, is refused by name.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pippin.core.config import Config
from pippin.core.config_tree import diff, override, transform
from pippin.core.errors import ConfigError
from pippin.layers.attention_config import GroupedQueryAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig
from pippin.layers.models.llama import llama, with_qk_norm
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import Llama3ScalingConfig, RoPEConfig
from pippin.layers.stack_config import RepeatConfig, TransformerLayerConfig

_LLAMA, _QWEN3 = "llama", "qwen3"
_ARCHITECTURES = {_LLAMA: "LlamaForCausalLM", _QWEN3: "Qwen3ForCausalLM"}
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    "relu": Activation.RELU,
}
_ROPE_TYPES = ("default", "llama3")
_ROPE_FIELDS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}
_MAX_SIZE = 1 << 24  # of any one dim: beyond all models, and small enough to compute with

_ATTENTION = "decoder.layer.attention"
_FEED_FORWARD = "decoder.layer.feed_forward"

# Fields that say how a model starts, is trained, or runs on some hardware; and those that the holder sets.
_NOT_IN_CONFIG_JSON: dict[type[Config], tuple[str, ...]] = {
    CausalLMConfig: ("activation_dtype", "z_loss", "loss_chunk_tokens"),
    EmbeddingConfig: ("vocab_size", "dim", "init"),
    RepeatConfig: ("input_dim", "remat", "unroll"),
    TransformerLayerConfig: ("input_dim",),
    GroupedQueryAttentionConfig: ("input_dim", "kernel", "cache"),
    FeedForwardConfig: ("input_dim",),
    LinearConfig: ("input_dim", "output_dim", "input_axis", "output_axis", "init"),
    RMSNormConfig: ("dim",),
    RoPEConfig: ("head_dim", "num_heads"),
}


def config_from_huggingface(raw: Mapping[str, Any]) -> CausalLMConfig:
    """The tree of a config.json of `llama` (SmolLM2, Llama 3) or `qwen3`.

    Raises:
        ConfigError: another kind of model, a feature that is not supported, a size that is
            absent or out of range.
    """
    model_type = _choice(raw, "model_type", _ARCHITECTURES)
    _refuse_unsupported(raw)
    dim, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    if raw.get("head_dim") is None and dim % num_heads:
        raise ConfigError(
            f"config.json: hidden_size ({dim}) must be a multiple of num_attention_heads ({num_heads}) where there "
            "is no head_dim. Write head_dim."
        )
    cfg = llama(
        vocab_size=_size(raw, "vocab_size"),
        dim=dim,
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_size(raw, "num_key_value_heads", num_heads),
        head_dim=_size(raw, "head_dim", 128 if model_type == _QWEN3 else dim // num_heads),
        hidden_dim=_size(raw, "intermediate_size"),
        tied=_flag(raw, "tie_word_embeddings"),
        position=_position(raw),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
    )
    activation = _choice(raw, "hidden_act", _ACTIVATIONS, "silu")
    changes: dict[str, Any] = {f"{_FEED_FORWARD}.activation": _ACTIVATIONS[activation]}
    if _flag(raw, "attention_bias"):
        changes |= {f"{_ATTENTION}.{p}_proj.bias": True for p in "qkvo"}
    if model_type == _LLAMA and _flag(raw, "mlp_bias"):
        changes |= {f"{_FEED_FORWARD}.{p}_proj.bias": True for p in ("gate", "up", "down")}
    cfg = override(cfg, changes)
    return with_qk_norm(cfg) if model_type == _QWEN3 else cfg


def config_to_huggingface(cfg: CausalLMConfig) -> dict[str, Any]:
    """The config.json of a tree, in the form that all versions of transformers read.

    Raises:
        ConfigError: the tree is no model of the Llama family; the error says where it differs.
    """
    decoder = _expect(cfg.decoder, RepeatConfig, "decoder")
    layer = _expect(decoder.layer, TransformerLayerConfig, "decoder.layer")
    attention = _expect(layer.attention, GroupedQueryAttentionConfig, _ATTENTION)
    feed_forward = _expect(layer.feed_forward, FeedForwardConfig, _FEED_FORWARD)
    position = _expect(attention.position, RoPEConfig, f"{_ATTENTION}.position")
    norm = _expect(cfg.norm, RMSNormConfig, "norm")
    model_type = _LLAMA if attention.qk_norm is None else _QWEN3
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": feed_forward.hidden_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": next(name for name, a in _ACTIVATIONS.items() if a is feed_forward.activation),
        "rms_norm_eps": norm.eps,
        "rope_theta": position.theta,
        "rope_scaling": _rope_scaling(position),
        "attention_bias": _has_bias(attention.q_proj),
        "tie_word_embeddings": cfg.head is None,
    }
    if model_type == _LLAMA:
        raw["mlp_bias"] = _has_bias(feed_forward.gate_proj)
    differences = diff(_computed(config_from_huggingface(raw)), _computed(cfg))
    if differences:
        raise ConfigError(
            "the model is not of the Llama family, so config.json cannot describe it. It differs from the nearest "
            f"{model_type} in: {'; '.join(differences)}. Change these, or save a bundle of pippin instead."
        )
    return raw


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    attends = "every layer of the family attends to all tokens before"
    types = raw.get("layer_types")
    checks = (
        (
            "quantization_config",
            raw.get("quantization_config") is None,
            "weights must be plain float32, float16 or bfloat16. Dequantise the model",
        ),
        ("use_sliding_window", raw.get("use_sliding_window") in (None, False), attends),
        (
            "layer_types",
            types is None or isinstance(types, list) and all(t == "full_attention" for t in types),
            attends,
        ),
        (
            "rope_interleaved",
            raw.get("rope_interleaved") in (None, False),
            "dims i and i + H/2 are rotated together. Permute the queries and keys",
        ),
        (
            "partial_rotary_factor",
            raw.get("partial_rotary_factor") in (None, 1),
            "all dims of a head are rotated",
        ),
    )
    for name, fits, rule in checks:
        if not fits:
            raise ConfigError(
                f"config.json: {name} is {_short(raw[name])}, which is not supported: {rule}, or choose another model."
            )


def _position(raw: Mapping[str, Any]) -> RoPEConfig:
    """Rotation, from `rope_parameters` (newer files) or from `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or not _ROPE_FIELDS >= rope.keys():
        raise ConfigError(
            f"config.json: RoPE is {_short(rope)}; it must be an object of {', '.join(sorted(_ROPE_FIELDS))}, the same "
            "for all layers. Choose another model."
        )
    _refuse_unsupported({"partial_rotary_factor": rope.get("partial_rotary_factor")})
    theta = _number(rope if "rope_theta" in rope else raw, "rope_theta", 10_000.0)
    kind = _choice(
        {"rope_type": rope.get("rope_type", rope.get("type"))}, "rope_type", _ROPE_TYPES, "default"
    )
    if kind == "default":
        return RoPEConfig(theta=theta)
    scaling = Llama3ScalingConfig(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_context=_size(rope, "original_max_position_embeddings"),
    )
    return RoPEConfig(theta=theta, scaling=scaling)


def _rope_scaling(position: RoPEConfig) -> dict[str, Any] | None:
    if position.scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": position.scaling.factor,
        "low_freq_factor": position.scaling.low_freq_factor,
        "high_freq_factor": position.scaling.high_freq_factor,
        "original_max_position_embeddings": position.scaling.original_context,
    }


def _computed(cfg: CausalLMConfig) -> CausalLMConfig:
    """A tree with all that does not change what the weights compute at its default."""

    def plain(c: Config) -> Config:
        names = _NOT_IN_CONFIG_JSON.get(type(c), ())
        return c.set(**{f.name: f.default for f in dataclasses.fields(c) if f.name in names})  # type: ignore[arg-type]

    return transform(cfg, plain)


def _expect[C: Config](cfg: Config, kind: type[C], path: str) -> C:
    if not isinstance(cfg, kind):
        raise ConfigError(
            f"{path} is a {type(cfg).TYPE}; in the Llama family it is a {kind.TYPE}, and config.json describes "
            "nothing else. Save a bundle of pippin instead."
        )
    return cfg


def _has_bias(proj: Config) -> bool:
    return isinstance(proj, LinearConfig) and proj.bias


def _choice(raw: Mapping[str, Any], name: str, options: Iterable[str], default: str | None = None) -> str:
    value = raw.get(name)
    value = default if value is None else value
    if value not in list(options):
        raise ConfigError(
            f"config.json: {name} is {_short(value)}, which is not supported: it must be one of "
            f"{', '.join(map(repr, options))}. Choose another model."
        )
    return value


def _size(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
        raise ConfigError(
            f"config.json: {name} is {_short(value)}; it must be an integer from 1 to {_MAX_SIZE}. Copy the file again."
        )
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(
            f"config.json: {name} is {_short(value)}; it must be a positive number. Copy the file again."
        )
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise ConfigError(
            f"config.json: {name} is {_short(value)}; it must be true or false. Copy the file again."
        )
    return bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
