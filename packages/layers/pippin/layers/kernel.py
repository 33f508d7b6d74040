"""Attention kernels: softmax(q k / sqrt(H)) v under a mask. All compute the same."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pippin.core.module import Module
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel_config import BlockwiseKernelConfig, ReferenceKernelConfig
from pippin.layers.precision import at_least_float32

Bias = Callable[[Int[Array, "B T"], Int[Array, "B S"]], Float[Array, "B N T S"] | None]


@dataclasses.dataclass(frozen=True)
class Logits:
    """How the logits of attention are made of queries and keys, and which are masked out."""

    scale: float
    window: int | None = None  # a query sees this many keys, its own included; None: all before it
    soft_cap: float | None = None  # logits become cap * tanh(logit / cap)
    bias: Bias | None = None  # added after the cap
    sinks: Float[Array, " N"] | None = None  # a logit for each head that takes weight and gives no value


class ReferenceKernel(Module):
    """Computes attention with all logits at once, in float32 or wider."""

    Config = ReferenceKernelConfig

    def __init__(self, cfg: ReferenceKernelConfig):
        del cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        return _attend(q, ctx.positions, ctx.segment_ids, kv, logits)


class BlockwiseKernel(Module):
    """Computes attention for one block of queries after the other.

    Where keys are aligned with queries, a block's keys end with the block, and
    start where the window does: what is masked anyway is not computed. Otherwise
    every block sees all keys. The weights are not kept for the backward pass, which computes
    those of a block again: memory grows with `block_size * S`, not with `T * S`.
    """

    Config = BlockwiseKernelConfig

    def __init__(self, cfg: BlockwiseKernelConfig):
        self.block_size = cfg.block_size

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        length = q.shape[1]
        attend = jax.checkpoint(functools.partial(_attend, logits=logits))
        blocks = []
        for start in range(0, length, self.block_size):
            stop = min(start + self.block_size, length)
            rows = slice(start, stop)
            first = 0 if logits.window is None else max(0, start - logits.window + 1)
            seen = _slice(kv, first, stop) if kv.aligned else kv
            segments = None if ctx.segment_ids is None else ctx.segment_ids[:, rows]
            blocks.append(attend(q[:, rows], ctx.positions[:, rows], segments, seen))
        return jnp.concatenate(blocks, axis=1)


def _slice(kv: KeyValues, start: int, stop: int) -> KeyValues:
    return jax.tree.map(lambda a: a[:, start:stop], kv)


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
