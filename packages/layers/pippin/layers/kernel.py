"""Attention kernels: softmax(q k / sqrt(H)) v under a mask. All compute the same."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pippin.core.module import Module
from pippin.core.sharding import mesh_in_use, num_shards, platform_in_use, shard_spec
from pippin.layers.context import Context, KeyValues, PagedKeyValues
from pippin.layers.kernel_config import AttentionShape, BlockwiseKernelConfig, ReferenceKernelConfig, choose
from pippin.layers.precision import at_least_float32

_MAX_UNROLLED = 16  # blocks of queries written out one after the other

Bias = Callable[[Int[Array, "B T"], Int[Array, "B S"]], Float[Array, "B N T S"] | None]


@dataclasses.dataclass(frozen=True)
class Logits:
    """How the logits of attention are made of queries and keys, and which are masked out."""

    scale: float
    window: int | None = None  # a query sees this many keys, its own included; None: all before it
    soft_cap: float | None = None  # logits become cap * tanh(logit / cap)
    bias: Bias | None = None  # added after the cap
    sinks: Float[Array, " N"] | None = None  # a logit for each head that takes weight and gives no value


def attention_shape(
    q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
) -> AttentionShape:
    """What a kernel is chosen by, of a call inside a program for the mesh in use, if there is one."""
    # A position encoding without a bias has the method all the same, and returns none.
    bias = None if logits.bias is None else jax.eval_shape(logits.bias, ctx.positions, kv.positions)
    _, query_length, num_heads, head_dim = q.shape
    return AttentionShape(
        platform=platform_in_use(),
        query_length=query_length,
        key_length=_key_length(kv),
        num_heads=num_heads,
        num_kv_heads=kv.k.shape[2],
        head_dim=head_dim,
        dtype=q.dtype.name,
        aligned=kv.aligned,
        window=logits.window,
        soft_cap=logits.soft_cap,
        has_bias=bias is not None,
        has_sinks=logits.sinks is not None,
        sequence_shards=num_shards("sequence"),
        head_shards=num_shards("heads"),
        kv_head_shards=num_shards("kv_heads"),
        page_size=kv.pages.shape[1] if isinstance(kv, PagedKeyValues) else 0,
        int8_pages=isinstance(kv, PagedKeyValues) and kv.scales is not None,
    )


def attention_specs() -> tuple[PartitionSpec, PartitionSpec, PartitionSpec, PartitionSpec]:
    """How the mesh in use splits queries, keys or values, tokens ([B, T]), and what there is one of for each head."""
    return (
        shard_spec(("batch", "sequence", "heads", None)),
        shard_spec(("batch", "sequence", "kv_heads", None)),
        shard_spec(("batch", "sequence")),
        shard_spec(("heads",)),
    )


def device_of_the_mesh() -> contextlib.AbstractContextManager[Any]:
    """Tells Pallas what device it compiles for, where that is one that is not here."""
    active = mesh_in_use()
    if active is None or jax.sharding.get_abstract_mesh().manual_axes:
        return contextlib.nullcontext()  # the device of this process; or `on_shards` told it
    return jax.sharding.use_abstract_mesh(active[1].abstract_mesh)


def _key_length(kv: KeyValues) -> int:
    return kv.tables.shape[1] * kv.pages.shape[1] if isinstance(kv, PagedKeyValues) else kv.k.shape[1]


_PADDING = -1  # the segment of tokens without a position: nothing else attends to them


def padded_segments(ctx: Context, kv: KeyValues) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Segments of queries and of keys, for kernels that mask by index: one where either has none, and padding apart."""
    packed = ctx.segment_ids is not None and kv.segment_ids is not None

    def padded(positions: Array, segment_ids: Array | None) -> Array:
        segments = jnp.zeros_like(positions) if segment_ids is None or not packed else segment_ids
        return jnp.where(positions < 0, _PADDING, segments)

    return padded(ctx.positions, ctx.segment_ids), padded(kv.positions, kv.segment_ids)


class ReferenceKernel(Module):
    """Computes attention with all logits at once, in float32 or wider."""

    Config = ReferenceKernelConfig

    def __init__(self, cfg: ReferenceKernelConfig):
        del cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        if isinstance(kv, PagedKeyValues):
            kv = of_pages(kv, ctx.positions, kv.tables, 0)
        return _attend(q, ctx.positions, ctx.segment_ids, kv, logits)


def of_pages(
    kv: PagedKeyValues, positions: Int[Array, "B T"], tables: Int[Array, "B P"], first: int | Array
) -> KeyValues:
    """The keys and values of some pages of each row, the first of which begins at the position `first`."""
    num_pages, size, _, head_dim = kv.pages.shape
    batch, count = tables.shape
    tables = jnp.clip(tables, 0, num_pages - 1)
    found = kv.pages[tables]
    if kv.scales is not None:
        found = found.astype(jnp.float32) * kv.scales[tables][..., None]
    found = found.reshape(batch, count * size, -1, 2, head_dim)
    at = first + jnp.arange(count * size, dtype=jnp.int32)[None]
    held = at <= jnp.max(positions, axis=1, keepdims=True)
    # What another row left behind may be NaN, which survives a weight of zero.
    k, v = (jnp.where(held[:, :, None, None], found[:, :, :, i], 0) for i in range(2))
    return KeyValues(k, v, jnp.where(held, at, -1), segment_ids=None, aligned=False)


class BlockwiseKernel(Module):
    """Computes attention for one block of queries after the other.

    Where keys are aligned with queries, a block's keys end with the block, and
    start where the window does: what is masked anyway is not computed. Otherwise
    every block sees all keys. The weights are not kept for the backward pass, which computes
    those of a block again: memory grows with `block_size * S`, not with `T * S`.

    More than 16 blocks are loops, so that a program does not grow with T: one, or 16 where keys
    are aligned and there is no window; the keys of each of these end with its last block.
    """

    Config = BlockwiseKernelConfig

    def __init__(self, cfg: BlockwiseKernelConfig):
        self.cfg, self.block_size = cfg, cfg.block_size

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result.

        Raises:
            ConfigError: the config does not support the call.
        """
        choose(self.cfg, attention_shape(q, kv, ctx, logits))
        length, size = q.shape[1], self.block_size
        whole = length // size
        loop = 1
        if whole > _MAX_UNROLLED:
            grows = kv.aligned and logits.window is None
            loop = -(-whole // _MAX_UNROLLED) if grows else whole
        attended = [
            self._loop(start * size, min(loop, whole - start), q, kv, ctx, logits)
            for start in range(0, whole, loop)
        ]
        if length % size:
            attended.append(_block(q, kv, ctx, logits, whole * size, length))
        return jnp.concatenate(attended, axis=1)

    def _loop(
        self, start: int, blocks: int, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T_out N H"]:
        """The results of some blocks of queries, the first of which begins at `start`."""
        size = self.block_size
        stop = start + blocks * size
        if blocks == 1:
            return _block(q, kv, ctx, logits, start, stop)

        @jax.checkpoint
        def block(first: Int[Array, ""], q: Array, kv: KeyValues, ctx: Context) -> Array:
            seen = _slice(kv, 0, stop) if kv.aligned else kv
            if kv.aligned and logits.window is not None:
                # Where the window reaches beyond the first key, the slice moves to later ones, which are masked.
                width = min(stop, logits.window - 1 + size)
                seen = _dynamic_slice(kv, first - (logits.window - 1), width)
            q, positions, segment_ids = _dynamic_slice((q, ctx.positions, ctx.segment_ids), first, size)
            return _attend(q, positions, segment_ids, seen, logits)

        firsts = jnp.arange(start, stop, size, dtype=jnp.int32)
        out = jax.lax.map(lambda first: block(first, q, kv, ctx), firsts)
        return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], blocks * size, *q.shape[2:])


def _block(
    q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits, start: int, stop: int
) -> Float[Array, "B T_out N H"]:
    """The results of the queries from `start` to `stop`."""

    # Slices are taken inside: what is kept for the backward pass is the whole, once for all blocks.
    @jax.checkpoint
    def block(q: Array, kv: KeyValues, ctx: Context) -> Array:
        first = 0 if logits.window is None else max(0, start - logits.window + 1)
        seen = _slice(kv, first, stop) if kv.aligned else kv
        q, positions, segment_ids = _slice((q, ctx.positions, ctx.segment_ids), start, stop)
        return _attend(q, positions, segment_ids, seen, logits)

    return block(q, kv, ctx)


def _slice(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda a: a[:, start:stop], tree)


def _dynamic_slice(tree: Any, start: Int[Array, ""], size: int) -> Any:
    """`size` tokens from `start` on, or the nearest that there are."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, jnp.maximum(start, 0), size, axis=1), tree)


def visible(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    kv: KeyValues,
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those of its segment, up to its own position, within the window."""
    distance = positions[:, :, None] - kv.positions[:, None, :]
    mask = (distance >= 0) & (kv.positions >= 0)[:, None, :]
    if window is not None:
        mask &= distance < window
    if segment_ids is not None and kv.segment_ids is not None:
        mask &= segment_ids[:, :, None] == kv.segment_ids[:, None, :]
    return mask


def _attend(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    kv: KeyValues,
    logits: Logits,
) -> Float[Array, "B T N H"]:
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[2]
    # Query heads in groups that share a key head: keys and values are never repeated.
    grouped = (q * logits.scale).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    accumulate = at_least_float32(q.dtype)
    s = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, kv.k.astype(q.dtype), preferred_element_type=accumulate)
    if logits.soft_cap is not None:
        s = logits.soft_cap * jnp.tanh(s / logits.soft_cap)
    bias = logits.bias(positions, kv.positions) if logits.bias else None
    if bias is not None:
        s += bias.reshape(s.shape).astype(s.dtype)
    mask = visible(positions, segment_ids, kv, logits.window)
    # Not -inf: a row of padding sees no key, and must not become NaN.
    s = jnp.where(mask[:, None, None], s, jnp.finfo(s.dtype).min / 2)
    p = _softmax(s, logits.sinks).astype(q.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", p, kv.v.astype(q.dtype)).reshape(q.shape)


def _softmax(s: Float[Array, "B K G T S"], sinks: Float[Array, " N"] | None) -> Float[Array, "B K G T S"]:
    """Softmax over the keys; a sink takes its share of the weight.

    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.3 (a learned sink logit).
    """
    if sinks is None:
        return jax.nn.softmax(s, axis=-1)
    sink = sinks.astype(s.dtype).reshape(1, s.shape[1], s.shape[2], 1, 1)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(s, axis=-1, keepdims=True), sink))
    weights = jnp.exp(s - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))
