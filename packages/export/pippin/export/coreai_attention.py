"""Rules of attention and of what it learns of positions, for Core AI. Import it late: see `coreai_tools`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from pippin.core.errors import ConfigError
from pippin.export.coreai_emitter import Emitter, reshaped, rule, sliced, transposed
from pippin.export.coreai_tools import Value, ops
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder, SharedKVAttentionConfig
from pippin.layers.position_config import ALiBiConfig, NoPEConfig, RoPEConfig

_AttentionConfig = GroupedQueryAttentionConfig | SharedKVAttentionConfig


@dataclasses.dataclass(frozen=True)
class Position:
    """What a position encoding does to queries and keys, [N, T, H], and to their logits."""

    rotate: Callable[[Value], Value]
    bias: Value | None = None  # [N, T, S]


@rule(NoPEConfig)
def _no_position(e: Emitter, cfg: NoPEConfig, path: str) -> Position:
    return Position(rotate=lambda x: x)


@rule(RoPEConfig)
def _rope(e: Emitter, cfg: RoPEConfig, path: str) -> Position:
    scaling = "" if cfg.scaling is None else "_".join(["", *map(str, dataclasses.astuple(cfg.scaling))])
    label = f"rope_{cfg.head_dim}_{cfg.theta}{scaling}"
    cos, sin = e.once(label, lambda: _angles(e, cfg, label))

    def rotate(x: Value) -> Value:
        heads, tokens, dim = x.type.shape
        first = sliced(x, [0, 0, 0], [heads, tokens, dim // 2])
        second = sliced(x, [0, 0, dim // 2], [heads, tokens, dim])
        rotated = [
            ops.broadcasting_sub(ops.broadcasting_mul(first, cos), ops.broadcasting_mul(second, sin)),
            ops.broadcasting_add(ops.broadcasting_mul(second, cos), ops.broadcasting_mul(first, sin)),
        ]
        return ops.concat(2, rotated)

    return Position(rotate)


def _angles(e: Emitter, cfg: RoPEConfig, label: str) -> tuple[Value, Value]:
    """Cosines and sines at the tokens' positions: [1, T, H / 2]. Padding behind the context gets the last ones."""
    angles = np.arange(e.context)[:, None] * np.array(cfg.build().frequencies)
    last = e.constant(f"last_{e.context}", np.array(e.context - 1, np.int32))
    at = reshaped(ops.broadcasting_minimum(e.positions, last), [e.tokens, 1])

    def rows(name: str, values: np.ndarray) -> Value:
        found = ops.gather_nd(e.constant(f"{name}_{label}", values.astype(np.float16)), at)
        return e.computed(reshaped(found, [1, e.tokens, angles.shape[1]]))

    return rows("cos", np.cos(angles)), rows("sin", np.sin(angles))


@rule(ALiBiConfig)
def _alibi(e: Emitter, cfg: ALiBiConfig, path: str) -> Position:
    def bias() -> Value:
        slopes = -np.array(cfg.build().slopes, e.dtype).reshape(-1, 1, 1)
        return ops.broadcasting_mul(
            ops.cast(e.distance, e.dtype), e.constant(f"slopes_{cfg.num_heads}", slopes)
        )

    return Position(rotate=lambda x: x, bias=e.once(f"alibi_{cfg.num_heads}", bias))


@rule(GroupedQueryAttentionConfig)
def _grouped_query_attention(e: Emitter, cfg: GroupedQueryAttentionConfig, path: str, x: Value) -> Value:
    position = _position(e, cfg, path)
    q = _queries(e, cfg, path, x, position)
    k = _heads(e, e.emit(cfg.k_proj, f"{path}.k_proj", x), cfg.num_kv_heads, cfg.head_dim)
    k = _encoded(e, cfg, f"{path}.k_norm", k, position)
    v = _heads(e, e.emit(cfg.v_proj, f"{path}.v_proj", x), cfg.num_kv_heads, cfg.head_dim)
    sinks = e.weight(f"{path}.sinks") if cfg.sinks else None
    attended = _attend(e, cfg, q, *e.extend_cache(k, v), position, sinks)
    return e.emit(cfg.o_proj, f"{path}.o_proj", attended)


@rule(SharedKVAttentionConfig)
def _shared_kv_attention(e: Emitter, cfg: SharedKVAttentionConfig, path: str, x: Value) -> Value:
    if e.key_values is None:
        raise ConfigError(
            f"the SharedKVAttention at {path} has no keys and values to read: no layer before it made any. Put it behind "
            "one that does."
        )
    position = _position(e, cfg, path)
    attended = _attend(e, cfg, _queries(e, cfg, path, x, position), *e.key_values, position, None)
    return e.emit(cfg.o_proj, f"{path}.o_proj", attended)


def _position(e: Emitter, cfg: _AttentionConfig, path: str) -> Position:
    dims = {"head_dim": cfg.head_dim, "num_heads": cfg.num_heads}
    return e.emit(cfg.position.set(**dims), f"{path}.position")


def _queries(e: Emitter, cfg: _AttentionConfig, path: str, x: Value, position: Position) -> Value:
    q = _heads(e, e.emit(cfg.q_proj, f"{path}.q_proj", x), cfg.num_heads, cfg.head_dim)
    return ops.broadcasting_mul(_encoded(e, cfg, f"{path}.q_norm", q, position), e.number(cfg.head_dim**-0.5))


def _heads(e: Emitter, x: Value, num_heads: int, head_dim: int) -> Value:
    """[T, N H] as [N, T, H]."""
    return transposed(reshaped(x, [e.tokens, num_heads, head_dim]), [1, 0, 2])


def _encoded(e: Emitter, cfg: _AttentionConfig, norm: str, x: Value, position: Position) -> Value:
    if cfg.qk_norm is not None and cfg.qk_norm_order is QKNormOrder.BEFORE_ROTATION:
        x = e.emit(cfg.qk_norm, norm, x)
    x = position.rotate(x)
    if cfg.qk_norm is not None and cfg.qk_norm_order is QKNormOrder.AFTER_ROTATION:
        x = e.emit(cfg.qk_norm, norm, x)
    return x


def _attend(
    e: Emitter, cfg: _AttentionConfig, q: Value, k: Value, v: Value, position: Position, sinks: Value | None
) -> Value:
    """[T, N H] of queries that are scaled. Those that share a key head stand below each other: none is repeated."""
    together = [cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads * e.tokens]
    apart = [cfg.num_heads, e.tokens]
    logits = ops.batch_matmul(reshaped(q, [*together, cfg.head_dim]), transposed(k, [0, 2, 1]))
    if cfg.soft_cap is not None:
        capped = ops.tanh(ops.broadcasting_mul(logits, e.number(1 / cfg.soft_cap)))
        logits = ops.broadcasting_mul(capped, e.number(cfg.soft_cap))
    logits = reshaped(logits, [*apart, e.context])
    if position.bias is not None:
        logits = ops.broadcasting_add(logits, position.bias)
    logits = ops.broadcasting_add(logits, e.mask(cfg.window))
    weights = ops.softmax(logits, 2) if sinks is None else _softmax_with_sinks(e, logits, sinks)
    attended = ops.batch_matmul(reshaped(weights, [*together, e.context]), v)
    attended = transposed(reshaped(attended, [*apart, cfg.head_dim]), [1, 0, 2])
    return reshaped(attended, [e.tokens, cfg.num_heads * cfg.head_dim])


def _softmax_with_sinks(e: Emitter, logits: Value, sinks: Value) -> Value:
    """Weights of which a logit of each head takes a part that gives no value."""
    num_heads = logits.type.shape[0]
    zeros = e.constant(f"zeros_{num_heads}_{e.tokens}", np.zeros((num_heads, e.tokens, 1), e.dtype))
    column = ops.broadcasting_add(zeros, reshaped(sinks, [num_heads, 1, 1]))
    weights = ops.softmax(ops.concat(2, [logits, column]), 2)
    return sliced(weights, [0, 0, 0], [num_heads, e.tokens, e.context])
