"""Grouped-query attention, and attention that reads another layer's keys and values."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.core.module import Module, constant_init, parameter
from pippin.core.sharding import constrain
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder, SharedKVAttentionConfig
from pippin.layers.context import Cache, Context, KeyValues, LayerOutput
from pippin.layers.kernel import Logits


class GroupedQueryAttention(Module):
    """Causal attention of N query heads over K key and value heads.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.2; the per-head norm of
    queries and keys as in AFM, arXiv:2407.21075, section 2.1.
    """

    Config = GroupedQueryAttentionConfig

    def __init__(self, cfg: GroupedQueryAttentionConfig, *, rngs: nnx.Rngs):
        dims = {"head_dim": cfg.head_dim, "num_heads": cfg.num_heads}
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.q_proj = _into_heads(cfg.q_proj, cfg.input_dim, cfg.num_heads * cfg.head_dim, "heads").build(
            rngs=rngs
        )
        kv_dim = cfg.num_kv_heads * cfg.head_dim
        self.k_proj = _into_heads(cfg.k_proj, cfg.input_dim, kv_dim, "kv_heads").build(rngs=rngs)
        self.v_proj = _into_heads(cfg.v_proj, cfg.input_dim, kv_dim, "kv_heads").build(rngs=rngs)
        self.o_proj = _out_of_heads(cfg.o_proj, cfg.num_heads * cfg.head_dim, cfg.input_dim).build(rngs=rngs)
        self.q_norm = None if cfg.qk_norm is None else cfg.qk_norm.set(dim=cfg.head_dim).build(rngs=rngs)
        self.k_norm = None if cfg.qk_norm is None else cfg.qk_norm.set(dim=cfg.head_dim).build(rngs=rngs)
        self.norm_order = cfg.qk_norm_order
        self.position = cfg.position.set(**dims).build()
        self.kernel = cfg.kernel.build()
        self.cache = cfg.cache.set(
            num_kv_heads=cfg.num_kv_heads, head_dim=cfg.head_dim, window=cfg.window
        ).build()
        sinks = (
            parameter(constant_init(0.0), rngs, (cfg.num_heads,), ("heads",), fan_in=1) if cfg.sinks else None
        )
        self.sinks = sinks
        self.scale, self.window, self.soft_cap = cfg.head_dim**-0.5, cfg.window, cfg.soft_cap

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """An empty cache for positions below `max_len`."""
        return self.cache.init(batch_size, max_len, dtype)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        """Attends from every token of `x` to what it may see, in `x` and in the cache."""
        q = _heads(self.q_proj(x), self.num_heads, "heads")
        k = _heads(self.k_proj(x), self.num_kv_heads, "kv_heads")
        v = _heads(self.v_proj(x), self.num_kv_heads, "kv_heads")
        q = _encode(q, ctx, self.position, self.q_norm, self.norm_order)
        k = _encode(k, ctx, self.position, self.k_norm, self.norm_order)
        if cache is None:
            kv = KeyValues(k, v, ctx.positions, ctx.segment_ids, aligned=True)
        else:
            cache, kv = self.cache.extend(cache, k, v, ctx.positions)
        sinks = None if self.sinks is None else self.sinks[...]
        logits = Logits(self.scale, self.window, self.soft_cap, self.position.bias, sinks)
        attended = self.kernel(q, kv, ctx, logits)
        return LayerOutput(self.o_proj(attended.reshape(*x.shape[:2], -1)), cache, kv)


class SharedKVAttention(Module):
    """Attention with queries of its own over the keys and values in the context.

    Source: the second block of the 2025 on-device AFM, arXiv:2507.13575, section 2.1.
    """

    Config = SharedKVAttentionConfig

    def __init__(self, cfg: SharedKVAttentionConfig, *, rngs: nnx.Rngs):
        self.num_heads = cfg.num_heads
        self.q_proj = _into_heads(cfg.q_proj, cfg.input_dim, cfg.num_heads * cfg.head_dim, "heads").build(
            rngs=rngs
        )
        self.o_proj = _out_of_heads(cfg.o_proj, cfg.num_heads * cfg.head_dim, cfg.input_dim).build(rngs=rngs)
        self.q_norm = None if cfg.qk_norm is None else cfg.qk_norm.set(dim=cfg.head_dim).build(rngs=rngs)
        self.norm_order = cfg.qk_norm_order
        self.position = cfg.position.set(head_dim=cfg.head_dim, num_heads=cfg.num_heads).build()
        self.kernel = cfg.kernel.build()
        self.scale, self.window, self.soft_cap = cfg.head_dim**-0.5, cfg.window, cfg.soft_cap

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """Nothing: what it reads lies in the cache of the layer that made it."""
        return ()

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        """Attends from every token of `x` to `ctx.kv`.

        Raises:
            ConfigError: no layer before this one made keys and values.
        """
        if ctx.kv is None:
            raise ConfigError(
                "SharedKVAttention got no keys and values to read: no layer before it made any. Put it behind "
                "one that does, as the reader of a SharedKVStack or later in a Sequence."
            )
        q = _heads(self.q_proj(x), self.num_heads, "heads")
        q = _encode(q, ctx, self.position, self.q_norm, self.norm_order)
        logits = Logits(self.scale, self.window, self.soft_cap, self.position.bias)
        attended = self.kernel(q, ctx.kv, ctx, logits)
        return LayerOutput(self.o_proj(attended.reshape(*x.shape[:2], -1)), cache, ctx.kv)


def _into_heads(proj: Config, input_dim: int, output_dim: int, axis: str) -> Config:
    return proj.set(input_dim=input_dim, output_dim=output_dim, output_axis=axis)


def _out_of_heads(proj: Config, input_dim: int, output_dim: int) -> Config:
    return proj.set(input_dim=input_dim, output_dim=output_dim, input_axis="heads", output_axis="embed")


def _heads(x: Float[Array, "B T P"], num_heads: int, axis: str) -> Float[Array, "B T N H"]:
    return constrain(x.reshape(*x.shape[:2], num_heads, -1), "batch", "sequence", axis, None)


def _encode(
    x: Float[Array, "B T N H"], ctx: Context, position: Any, norm: Any, order: QKNormOrder
) -> Float[Array, "B T N H"]:
    if norm is not None and order is QKNormOrder.BEFORE_ROTATION:
        x = norm(x)
    x = position.rotate(x, ctx.positions)  # pyright: ignore[reportAttributeAccessIssue]  of the interface
    if norm is not None and order is QKNormOrder.AFTER_ROTATION:
        x = norm(x)
    return x
