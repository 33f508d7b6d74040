"""Rules of attention and of what it learns of positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from pippin.core.errors import ConfigError
from pippin.export.coreml_tools import Builder as mb
from pippin.export.lower_emitter import Emitter, Var, reshaped, rule, scalar
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder, SharedKVAttentionConfig
from pippin.layers.position_config import ALiBiConfig, NoPEConfig, RoPEConfig

_AttentionConfig = GroupedQueryAttentionConfig | SharedKVAttentionConfig


@dataclasses.dataclass(frozen=True)
class Position:
    """What a position encoding does to queries and keys, [1, N, T, H], and to their logits."""

    rotate: Callable[[Var], Var]
    bias: Var | None = None  # [1, N, T, S]


@rule(NoPEConfig)
def _no_position(e: Emitter, cfg: NoPEConfig, path: str) -> Position:
    return Position(rotate=lambda x: x)


@rule(RoPEConfig)
def _rope(e: Emitter, cfg: RoPEConfig, path: str) -> Position:
    scaling = "" if cfg.scaling is None else "_".join(["", *map(str, dataclasses.astuple(cfg.scaling))])
    label = f"rope_{cfg.head_dim}_{cfg.theta}{scaling}"
    cos, sin = e.once(label, lambda: _angles(e, cfg, label))

    def rotate(x: Var) -> Var:
        first, second = mb.split(x=x, num_splits=2, axis=-1)
        return mb.concat(
            values=[
                mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
                mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin)),
            ],
            axis=-1,
        )

    return Position(rotate)


def _angles(e: Emitter, cfg: RoPEConfig, label: str) -> tuple[Var, Var]:
    """Cosines and sines at the tokens' positions: [1, 1, T, H / 2]. Padding behind the context gets the last ones."""
    angles = np.arange(e.context)[:, None] * np.array(cfg.build().frequencies)
    at = mb.minimum(x=e.positions, y=np.int32(e.context - 1))

    def rows(name: str, values: np.ndarray) -> Var:
        table = e.constant(f"{name}_{label}", values.astype(np.float16))
        found = mb.gather(x=table, indices=at, axis=0, validate_indices=False)
        return reshaped(found, [1, 1, e.tokens, angles.shape[1]])

    return rows("cos", np.cos(angles)), rows("sin", np.sin(angles))


@rule(ALiBiConfig)
def _alibi(e: Emitter, cfg: ALiBiConfig, path: str) -> Position:
    def bias() -> Var:
        slopes = -np.array(cfg.build().slopes, np.float16).reshape(1, -1, 1, 1)
        distance = mb.cast(x=e.distance, dtype="fp16")
        return mb.mul(x=distance, y=e.constant(f"slopes_{cfg.num_heads}", slopes))

    return Position(rotate=lambda x: x, bias=e.once(f"alibi_{cfg.num_heads}", bias))


@rule(GroupedQueryAttentionConfig)
def _grouped_query_attention(e: Emitter, cfg: GroupedQueryAttentionConfig, path: str, x: Var) -> Var:
    position = _position(e, cfg, path)
    q = _queries(e, cfg, path, x, position)
    k = _heads(e, e.emit(cfg.k_proj, f"{path}.k_proj", x), cfg.num_kv_heads, cfg.head_dim)
    k = _encoded(e, cfg, f"{path}.k_norm", k, position)
    v = _heads(e, e.emit(cfg.v_proj, f"{path}.v_proj", x), cfg.num_kv_heads, cfg.head_dim)
    sinks = e.weight(f"{path}.sinks") if cfg.sinks else None
    attended = _attend(e, cfg, q, *e.extend_cache(k, v), position, sinks)
    return e.emit(cfg.o_proj, f"{path}.o_proj", attended)


@rule(SharedKVAttentionConfig)
def _shared_kv_attention(e: Emitter, cfg: SharedKVAttentionConfig, path: str, x: Var) -> Var:
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


def _queries(e: Emitter, cfg: _AttentionConfig, path: str, x: Var, position: Position) -> Var:
    q = _heads(e, e.emit(cfg.q_proj, f"{path}.q_proj", x), cfg.num_heads, cfg.head_dim)
    return mb.mul(x=_encoded(e, cfg, f"{path}.q_norm", q, position), y=scalar(cfg.head_dim**-0.5))


def _heads(e: Emitter, x: Var, num_heads: int, head_dim: int) -> Var:
    """[1, T, N H] as [1, N, T, H]."""
    return mb.transpose(x=reshaped(x, [1, e.tokens, num_heads, head_dim]), perm=[0, 2, 1, 3])


def _encoded(e: Emitter, cfg: _AttentionConfig, norm: str, x: Var, position: Position) -> Var:
    if cfg.qk_norm is not None and cfg.qk_norm_order is QKNormOrder.BEFORE_ROTATION:
        x = e.emit(cfg.qk_norm, norm, x)
    x = position.rotate(x)
    if cfg.qk_norm is not None and cfg.qk_norm_order is QKNormOrder.AFTER_ROTATION:
        x = e.emit(cfg.qk_norm, norm, x)
    return x


def _attend(
    e: Emitter, cfg: _AttentionConfig, q: Var, k: Var, v: Var, position: Position, sinks: Var | None
) -> Var:
    """[1, T, N H] of queries that are scaled. Those that share a key head stand below each other: none is repeated."""
    together = [1, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads * e.tokens]
    apart = [1, cfg.num_heads, e.tokens]
    logits = mb.matmul(x=reshaped(q, [*together, cfg.head_dim]), y=k, transpose_y=True)
    if cfg.soft_cap is not None:
        capped = mb.tanh(x=mb.mul(x=logits, y=scalar(1 / cfg.soft_cap)))
        logits = mb.mul(x=capped, y=scalar(cfg.soft_cap))
    logits = reshaped(logits, [*apart, e.context])
    if position.bias is not None:
        logits = mb.add(x=logits, y=position.bias)
    logits = mb.add(x=logits, y=e.mask(cfg.window))
    weights = mb.softmax(x=logits, axis=-1) if sinks is None else _softmax_with_sinks(e, logits, sinks)
    attended = mb.matmul(x=reshaped(weights, [*together, e.context]), y=v)
    attended = mb.transpose(x=reshaped(attended, [*apart, cfg.head_dim]), perm=[0, 2, 1, 3])
    return reshaped(attended, [1, e.tokens, cfg.num_heads * cfg.head_dim])


def _softmax_with_sinks(e: Emitter, logits: Var, sinks: Var) -> Var:
    """Weights of which a logit of each head takes a part that gives no value."""
    num_heads = logits.shape[1]
    zeros = e.constant(f"zeros_{num_heads}_{e.tokens}", np.zeros((1, num_heads, e.tokens, 1), np.float16))
    column = mb.add(x=zeros, y=reshaped(sinks, [1, num_heads, 1, 1]))
    weights = mb.softmax(x=mb.concat(values=[logits, column], axis=-1), axis=-1)
    return mb.slice_by_size(x=weights, begin=[0, 0, 0, 0], size=[1, num_heads, e.tokens, e.context])
