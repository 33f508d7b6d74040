"""Attention to keys in pages on TPUs: JAX's Pallas kernel for rows of any number of queries."""

from functools import partial

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.core.sharding import on_shards
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, device_of_the_mesh
from pippin.layers.kernel_paged import paged_keys, paged_specs
from pippin.layers.kernel_paged_config import PagedTPUKernelConfig


class PagedTPUKernel(Module):
    """Computes attention while pages come from memory, each once for all queries of its row and all heads.

    Queries of all rows are put one after the other, without padding. On a mesh, each device runs the kernel on its
    heads.
    """

    Config = PagedTPUKernelConfig

    def __init__(self, cfg: PagedTPUKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result; 0 for padding.

        Raises:
            ConfigError: the config does not support the call.
        """
        kv = paged_keys(self.cfg, q, kv, ctx, logits)
        attend = partial(self._attend, logits=logits)
        specs = paged_specs()
        with device_of_the_mesh():
            return on_shards(attend, specs[:4], specs[0])(q, kv.pages, kv.tables, ctx.positions)

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        pages: Float[Array, "pages page_size two_K H"],
        tables: Int[Array, "B P"],
        positions: Int[Array, "B T"],
        *,
        logits: Logits,
    ) -> Float[Array, "B T N H"]:
        """Attention of one device."""
        batch, length, *rest = q.shape
        real = positions >= 0
        starts = jnp.pad(jnp.cumsum(jnp.sum(real, axis=1, dtype=jnp.int32)), (1, 0))
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        slots = jnp.where(real, starts[:-1, None] + rank, batch * length)  # padding goes nowhere
        flat = (
            jnp.zeros((batch * length, *rest), pages.dtype).at[slots].set(q.astype(pages.dtype), mode="drop")
        )
        out = ragged_paged_attention(
            flat,
            pages,
            jnp.max(positions, axis=1) + 1,
            jnp.clip(tables, 0, pages.shape[0] - 1),
            starts,
            jnp.full(1, batch, jnp.int32),
            sm_scale=logits.scale,
            sliding_window=logits.window,
            soft_cap=logits.soft_cap,
            num_kv_pages_per_block=min(tables.shape[1], max(1, self.cfg.block_size // pages.shape[1])),
            num_queries_per_block=min(batch * length, self.cfg.query_block_size),
        )
        out = out[jnp.minimum(slots, batch * length - 1)]
        return jnp.where(real[:, :, None, None], out, 0).astype(q.dtype)
