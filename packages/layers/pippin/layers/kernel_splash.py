"""Splash attention: JAX's Pallas kernel for TPUs, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.core.sharding import on_shards
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, attention_shape, attention_specs, padded_segments
from pippin.layers.kernel_config import SplashKernelConfig, choose


class SplashKernel(Module):
    """Computes attention in blocks that never leave the TPU's own memory.

    Positions within a segment follow each other, so the mask is by index and segment.
    Query heads that share a key head read it where it lies: keys are not repeated.
    On a mesh, each device runs the kernel on its sequences and heads.

    Source: Dao 2023, arXiv:2307.08691, section 3 (the online softmax and its backward pass).
    """

    Config = SplashKernelConfig

    def __init__(self, cfg: SplashKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result.

        Raises:
            ConfigError: the config does not support the call.
        """
        choose(self.cfg, attention_shape(q, kv, ctx, logits))
        queries, keys = padded_segments(ctx, kv)
        args = (q * logits.scale, kv.k.astype(q.dtype), kv.v.astype(q.dtype), queries, keys)
        sinks = () if logits.sinks is None else (logits.sinks.astype(jnp.float32),)

        def attend(*args: Array) -> Array:
            return self._attend(*args, window=logits.window, soft_cap=logits.soft_cap)

        heads, kv_heads, tokens, head = attention_specs()
        specs = (heads, kv_heads, kv_heads, tokens, tokens, head)
        return on_shards(attend, specs[: 5 + len(sinks)], heads)(*args, *sinks)

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        queries: Int[Array, "B T"],
        keys: Int[Array, "B T"],
        sinks: Float[Array, " N"] | None = None,
        *,
        window: int | None,
        soft_cap: float | None,
    ) -> Float[Array, "B T N H"]:
        """Attention of one device; `queries` and `keys` are their segments."""
        length, num_heads = q.shape[1:3]
        size = self.cfg.block(length)
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([_mask(length, window)] * num_heads),
            block_sizes=splash_attention.BlockSizes(
                block_q=size,
                block_kv=size,
                block_q_dq=size,
                block_kv_dq=size,
                block_q_dkv=size,
                block_kv_dkv=size,
            ),
            attn_logits_soft_cap=soft_cap,
            interpret=self.cfg.interpret,
        )

        def row(q: Array, k: Array, v: Array, queries: Array, keys: Array) -> Any:
            return kernel(q, k, v, splash_attention.SegmentIds(queries, keys), sinks)

        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # heads before tokens
        return jnp.swapaxes(jax.vmap(row)(q, k, v, queries, keys), 1, 2)


def _mask(length: int, window: int | None) -> splash_attention.Mask:
    if window is None or window >= length:
        return splash_attention.CausalMask((length, length))
    return splash_attention.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
