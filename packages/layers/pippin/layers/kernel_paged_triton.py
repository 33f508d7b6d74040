"""Attention to keys in pages on NVIDIA GPUs: a Pallas kernel by Triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.core.sharding import on_shards
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, device_of_the_mesh
from pippin.layers.kernel_paged import paged_keys, paged_specs
from pippin.layers.kernel_paged_config import PagedTritonKernelConfig

_LOWEST = -1e30  # a masked logit: far below all others, and differences of two are finite
_TILE = 16  # rows of what matrix units multiply, at least


class PagedTritonKernel(Module):
    """Computes attention of the queries and heads that share a key head, in programs that read no more pages than they see.

    On a mesh, each device runs the kernel on its heads.

    Source: Dao 2023, arXiv:2307.08691, section 3.1 (the online softmax).
    """

    Config = PagedTritonKernelConfig

    def __init__(self, cfg: PagedTritonKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result; 0 for padding.

        Raises:
            ConfigError: the config does not support the call.
        """
        kv = paged_keys(self.cfg, q, kv, ctx, logits)
        sinks = jnp.full(q.shape[2], -jnp.inf) if logits.sinks is None else logits.sinks
        specs = paged_specs()
        attend = on_shards(partial(self._attend, logits=logits), specs, specs[0])
        with device_of_the_mesh():
            return attend(q * logits.scale, kv.pages, kv.tables, ctx.positions, sinks.astype(jnp.float32))

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        pages: Float[Array, "pages page_size two_K H"],
        tables: Int[Array, "B P"],
        positions: Int[Array, "B T"],
        sinks: Float[Array, " N"],
        *,
        logits: Logits,
    ) -> Float[Array, "B T N H"]:
        """Attention of one device. A key head's queries, of all its heads, are the rows of one matrix."""
        batch, length, num_heads, head_dim = q.shape
        num_pages, page_size, num_kv_heads = pages.shape[0], pages.shape[1], pages.shape[2] // 2
        group = num_heads // num_kv_heads
        rows = length * group
        tile = min(self.cfg.block_size, max(_TILE, pl.next_power_of_2(rows)))
        count = self.cfg.block_size // page_size  # pages in a block

        def per_row(a: Array, fill: Any) -> Array:
            return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -rows % tile)], constant_values=fill)

        grouped = q.reshape(batch, length, num_kv_heads, group, head_dim).swapaxes(1, 2)
        grouped = grouped.reshape(batch, num_kv_heads, rows, head_dim).astype(pages.dtype)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, -rows % tile), (0, 0)))
        at = per_row(jnp.repeat(positions, group, axis=1), -1)
        sinks = per_row(jnp.tile(sinks.reshape(num_kv_heads, group), (1, length)), 0.0)
        tables = jnp.clip(tables, 0, num_pages - 1)
        tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % count)))
        of_tile = pl.BlockSpec((None, None, tile, head_dim), lambda b, n, i: (b, n, i, 0))

        def of_pages(part: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (num_pages, page_size, None, head_dim), lambda b, n, i: (0, 0, 2 * n + part, 0)
            )

        out = pl.pallas_call(
            partial(_kernel, logits.window, logits.soft_cap, count),
            grid=(batch, num_kv_heads, grouped.shape[2] // tile),
            in_specs=[
                of_tile,
                of_pages(0),
                of_pages(1),
                pl.BlockSpec((None, tables.shape[1]), lambda b, n, i: (b, 0)),
                pl.BlockSpec((None, tile), lambda b, n, i: (b, i)),
                pl.BlockSpec((None, tile), lambda b, n, i: (n, i)),
            ],
            out_specs=of_tile,
            out_shape=jax.ShapeDtypeStruct(grouped.shape, grouped.dtype),
            compiler_params=triton.CompilerParams(
                num_warps=8 if head_dim > 128 else 4, num_stages=1 if head_dim > 128 else 2
            ),
            interpret=self.cfg.interpret,
            name="pippin_paged_attention",
        )(grouped, pages, pages, tables, at, sinks)
        out = out[:, :, :rows].reshape(batch, num_kv_heads, length, group, head_dim).swapaxes(1, 2)
        return out.reshape(q.shape).astype(q.dtype)


def _kernel(
    window: int | None,
    soft_cap: float | None,
    count: int,
    q: Any,
    k: Any,
    v: Any,
    tables: Any,
    positions: Any,
    sinks: Any,
    out: Any,
) -> None:
    """The result of one tile of queries: positions are those of its rows, and blocks are of `count` pages."""
    page_size, head_dim = k.shape[1:]
    size = count * page_size
    queries, at = q[...], positions[...]
    last = jnp.max(at)

    def body(i: Array, state: Any) -> Any:
        top, total, sums = state
        found = tables[pl.ds(i * count, count)]
        keys, values = (ref[found].reshape(size, head_dim) for ref in (k, v))
        s = triton.dot(queries, keys, trans_b=True)
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        of_keys = i * size + jnp.arange(size, dtype=jnp.int32)
        distance = at[:, None] - of_keys[None, :]
        sees = distance >= 0
        if window is not None:
            sees &= distance < window
        s = jnp.where(sees, s, _LOWEST)
        new = jnp.maximum(top, jnp.max(s, axis=1))
        p, kept = jnp.where(sees, jnp.exp(s - new[:, None]), 0.0), jnp.exp(top - new)
        # What another row left behind may be NaN, which survives a weight of zero.
        values = jnp.where((of_keys <= last)[:, None], values, jnp.zeros_like(values))
        sums = sums * kept[:, None] + triton.dot(p.astype(values.dtype), values)
        return new, total * kept + jnp.sum(p, axis=1), sums

    rows = queries.shape[0]
    state = (
        jnp.full(rows, _LOWEST, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )
    first, stop = 0, jnp.minimum((last + size) // size, tables.shape[0] // count)
    if window is not None:
        earliest = jnp.min(jnp.where(at < 0, last, at))
        first = jnp.maximum(earliest - (window - 1), 0) // size
    top, total, sums = jax.lax.fori_loop(first, stop, body, state)
    new = jnp.maximum(top, sinks[...])
    total = total * jnp.exp(top - new) + jnp.exp(sinks[...] - new)
    share = jnp.where(at < 0, 0.0, jnp.exp(top - new) / jnp.where(total > 0, total, 1.0))
    out[...] = (sums * share[:, None]).astype(out.dtype)
