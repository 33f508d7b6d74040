"""Attention to keys in pages, for any platform."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.core.sharding import shard_spec
from pippin.layers.context import Context, KeyValues, PagedKeyValues
from pippin.layers.kernel import Logits, attention_shape, of_pages, visible
from pippin.layers.kernel_config import choose
from pippin.layers.kernel_paged_config import PagedBlockwiseKernelConfig
from pippin.layers.precision import at_least_float32


class PagedBlockwiseKernel(Module):
    """Computes attention for one block of each row's pages after the other, and keeps the sums of the blocks so far.

    Memory does not grow with the pages of a row, and no more blocks are read than the longest row has, from the first
    that a window reaches on. It has no backward pass: what is trained has no cache.

    Source: Dao 2023, arXiv:2307.08691, section 3.1 (the online softmax).
    """

    Config = PagedBlockwiseKernelConfig

    def __init__(self, cfg: PagedBlockwiseKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result; 0 for padding.

        Raises:
            ConfigError: the config does not support the call.
        """
        kv = paged_keys(self.cfg, q, kv, ctx, logits)
        wide, size = at_least_float32(q.dtype), kv.pages.shape[1]
        count = max(1, self.cfg.block_size // size)  # pages in a block
        tables = jnp.pad(kv.tables, ((0, 0), (0, -kv.tables.shape[1] % count)))
        batch, length, num_heads, _ = q.shape
        num_kv_heads = kv.k.shape[2]
        grouped = (q * logits.scale).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, -1)
        lowest = jnp.finfo(wide).min / 2

        def body(i: Array, state: Any) -> Any:
            top, total, out = state
            of_block = jax.lax.dynamic_slice_in_dim(tables, i * count, count, axis=1)
            keys = of_pages(kv, ctx.positions, of_block, i * count * size)
            k, v = keys.k.astype(q.dtype), keys.v.astype(q.dtype)
            s = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k, preferred_element_type=wide)
            if logits.soft_cap is not None:
                s = logits.soft_cap * jnp.tanh(s / logits.soft_cap)
            bias = logits.bias(ctx.positions, keys.positions) if logits.bias else None
            if bias is not None:
                s += jnp.moveaxis(bias, 1, 2).reshape(s.shape).astype(wide)
            mask = visible(ctx.positions, None, keys, logits.window)[:, :, None, None]
            new = jnp.maximum(top, jnp.max(jnp.where(mask, s, lowest), axis=-1))
            p, kept = jnp.where(mask, jnp.exp(s - new[..., None]), 0.0), jnp.exp(top - new)
            values = jnp.einsum("BTKGS,BSKH->BTKGH", p.astype(q.dtype), v, preferred_element_type=wide)
            return new, total * kept + jnp.sum(p, axis=-1), out * kept[..., None] + values

        state = (
            jnp.full(grouped.shape[:-1], lowest, wide),
            jnp.zeros(grouped.shape[:-1], wide),
            jnp.zeros(grouped.shape, wide),
        )
        blocks = _blocks(ctx.positions, logits.window, count * size, tables.shape[1] // count)
        top, total, out = jax.lax.fori_loop(*blocks, body, state)
        if logits.sinks is not None:
            sinks = logits.sinks.astype(wide).reshape(1, 1, num_kv_heads, -1)
            new = jnp.maximum(top, sinks)
            total, out = (
                total * jnp.exp(top - new) + jnp.exp(sinks - new),
                out * jnp.exp(top - new)[..., None],
            )
        out /= jnp.where(total > 0, total, 1.0)[..., None]
        return out.astype(q.dtype).reshape(q.shape)


def paged_keys(
    cfg: Any, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
) -> PagedKeyValues:
    """The keys that a kernel of this config was given.

    Raises:
        ConfigError: the config does not support the call, as where keys are in no pages.
    """
    choose(cfg, attention_shape(q, kv, ctx, logits))
    assert isinstance(kv, PagedKeyValues)
    return kv


def paged_specs() -> tuple[PartitionSpec, ...]:
    """How the mesh in use splits queries, pages, tables, positions, and what there is one of for each head.

    Any row may read any page, so that rows are not split.
    """
    everywhere = PartitionSpec()
    heads, kv_heads = (shard_spec((None, None, axis, None)) for axis in ("heads", "kv_heads"))
    return heads, kv_heads, everywhere, everywhere, shard_spec(("heads",))


def _blocks(positions: Array, window: int | None, size: int, count: int) -> tuple[Array, Array]:
    """The blocks that queries see keys in: the first, and the one after the last."""
    stop = jnp.minimum((jnp.max(positions) + size) // size, count).astype(jnp.int32)
    if window is None:
        return jnp.zeros((), jnp.int32), stop
    earliest = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions))
    return jnp.maximum(earliest - (window - 1), 0) // size, stop
