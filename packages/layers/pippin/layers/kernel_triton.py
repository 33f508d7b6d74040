"""Attention for GPUs of what cuDNN refuses: a Pallas kernel by Triton, forward and backward."""

import dataclasses
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
from pippin.layers.kernel import (
    Logits,
    attention_shape,
    attention_specs,
    device_of_the_mesh,
    padded_segments,
)
from pippin.layers.kernel_config import TritonKernelConfig, choose

_LOWEST = -1e30  # a masked logit: far below all others, and differences of two are finite


class TritonKernel(Module):
    """Computes attention in blocks that stay on the GPU's processors: no logits go to memory, and no key is repeated.

    Positions within a segment follow each other, so the mask is by index and segment. Blocks that are behind all of a
    block's queries, or before their window, are not read. On a mesh, each device runs the kernel on its sequences and
    heads. The products of float32 are of full precision.

    Source: Dao 2023, arXiv:2307.08691, section 3 (the online softmax and its backward pass).
    """

    Config = TritonKernelConfig

    def __init__(self, cfg: TritonKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result.

        Raises:
            ConfigError: the config does not support the call.
        """
        choose(self.cfg, attention_shape(q, kv, ctx, logits))
        # Each key is of the token of a query: one array of segments is that of both.
        _, segments = padded_segments(ctx, kv)
        sinks = jnp.full(q.shape[2], -jnp.inf) if logits.sinks is None else logits.sinks
        row_bytes = pl.next_power_of_2(q.shape[3]) * q.dtype.itemsize
        call = _Call(
            self.cfg.block(q.shape[1], row_bytes), logits.window, logits.soft_cap, self.cfg.interpret
        )
        heads, kv_heads, tokens, head = attention_specs()
        attend = on_shards(partial(_attend, call), (heads, kv_heads, kv_heads, tokens, head), heads)
        with device_of_the_mesh():
            return attend(
                q * logits.scale,
                kv.k.astype(q.dtype),
                kv.v.astype(q.dtype),
                segments,
                sinks.astype(jnp.float32),
            )


@dataclasses.dataclass(frozen=True)
class _Call:
    size: int  # of a block: tokens
    window: int | None
    soft_cap: float | None
    interpret: bool

    def run(
        self, kernel: Any, products: int, q: Array, heads: int, in_specs: Any, out_specs: Any, out: Any
    ) -> Any:
        """A kernel of so many products of T times T, as a function of arrays, on a grid of blocks, rows and heads."""
        batch, length, num_heads, head_dim = q.shape
        # What a loop reads for its next turn lies beside what it works on: of wide heads, one turn's must do.
        params = triton.CompilerParams(
            num_warps=8 if head_dim > 64 else 4, num_stages=1 if head_dim > 128 else 2
        )
        pairs = batch * num_heads * length * length
        # Its loops turn as often as their bounds say when it runs: this is told as if no block were skipped.
        cost = pl.CostEstimate(
            flops=2 * products * pairs * head_dim,
            transcendentals=pairs,
            bytes_accessed=(products + 1) * q.size * q.dtype.itemsize,
        )
        return pl.pallas_call(
            partial(kernel, self, head_dim),
            grid=(length // self.size, batch, heads),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out,
            compiler_params=params,
            cost_estimate=cost,
            interpret=self.interpret,
            name=f"pippin_{kernel.__name__.strip('_')}",
        )

    def key_blocks(self, i: Array) -> tuple[Any, Any]:
        """The blocks of keys that the queries of a block see: the first, and the one after the last."""
        first = 0 if self.window is None else jnp.maximum(i * self.size - (self.window - 1), 0) // self.size
        return first, i + 1

    def query_blocks(self, i: Array, count: int) -> tuple[Any, Any]:
        """The blocks of queries that see the keys of a block, of so many."""
        last = count - 1
        if self.window is not None:
            last = jnp.minimum(((i + 1) * self.size - 1 + self.window - 1) // self.size, last)
        return i, last + 1

    def logits(self, q: Array, k: Array, of_q: tuple[Array, Array], of_k: tuple[Array, Array]) -> Any:
        """Capped logits, masked, and the cap's derivative. `of_q` and `of_k` are indices and segments."""
        s, slope = triton.dot(q, k, trans_b=True), 1.0
        if self.soft_cap is not None:
            tanh = jnp.tanh(s / self.soft_cap)
            s, slope = self.soft_cap * tanh, 1 - tanh * tanh
        distance = of_q[0][:, None] - of_k[0][None, :]
        sees = (distance >= 0) & (of_q[1][:, None] == of_k[1][None, :])
        if self.window is not None:
            sees &= distance < self.window
        return jnp.where(sees, s, _LOWEST), slope

    def block(self, i: Any) -> Any:
        return pl.ds(i * self.size, self.size)

    def tokens(self, i: Any, segments: Any) -> tuple[Array, Array]:
        """Indices and segments of a block."""
        return i * self.size + jnp.arange(self.size, dtype=jnp.int32), segments[self.block(i)]


# In kernels, blocks are as wide as the next power of two: Triton has no others.
def _load(ref: Any, head_dim: int) -> Array:
    return triton.load(ref, mask=_in_head(ref, head_dim), other=0.0)


def _store(ref: Any, value: Array, head_dim: int) -> None:
    triton.store(ref, value.astype(ref.dtype), mask=_in_head(ref, head_dim))


def _in_head(ref: Any, head_dim: int) -> Array:
    return jnp.broadcast_to(jnp.arange(ref.shape[-1])[None, :] < head_dim, ref.shape)


def _forward_kernel(
    call: _Call, head_dim: int, q: Any, k: Any, v: Any, segments: Any, sink: Any, out: Any, normaliser: Any
) -> None:
    i = pl.program_id(0)
    queries, of_q = _load(q, head_dim), call.tokens(i, segments)

    def body(j: Array, state: Any) -> Any:
        top, total, sums = state
        keys, values = (_load(ref.at[call.block(j)], head_dim) for ref in (k, v))
        s, _ = call.logits(queries, keys, of_q, call.tokens(j, segments))
        new = jnp.maximum(top, jnp.max(s, axis=1))
        p, kept = jnp.exp(s - new[:, None]), jnp.exp(top - new)
        sums = sums * kept[:, None] + triton.dot(p.astype(values.dtype), values)
        return new, total * kept + jnp.sum(p, axis=1), sums

    state = (
        jnp.full(call.size, _LOWEST, jnp.float32),
        jnp.zeros(call.size, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    # Weights of a row that saw nothing yet come to nothing in the block of the row's own token, which is the last.
    top, total, sums = jax.lax.fori_loop(*call.key_blocks(i), body, state)
    new = jnp.maximum(top, sink[...])
    kept = jnp.exp(top - new)
    total = total * kept + jnp.exp(sink[...] - new)
    _store(out, sums * (kept / total)[:, None], head_dim)
    normaliser[...] = new + jnp.log(total)


def _weights(
    call: _Call, q: Array, k: Array, v: Array, of_out: Array, of_q: Any, of_k: Any, normaliser: Any, mean: Any
) -> tuple[Array, Array]:
    """The weights of a block, and the gradient of its logits."""
    s, slope = call.logits(q, k, of_q, of_k)
    p = jnp.exp(s - normaliser[:, None])
    of_s = p * (triton.dot(of_out, v, trans_b=True) - mean[:, None]) * slope
    return p.astype(q.dtype), of_s.astype(q.dtype)


def _query_kernel(
    call: _Call,
    head_dim: int,
    q: Any,
    k: Any,
    v: Any,
    segments: Any,
    of_out: Any,
    normaliser: Any,
    mean: Any,
    of_q: Any,
) -> None:
    i = pl.program_id(0)
    queries, gradients = _load(q, head_dim), _load(of_out, head_dim)
    tokens, of_rows = call.tokens(i, segments), (normaliser[...], mean[...])

    def body(j: Array, sums: Array) -> Array:
        keys, values = (_load(ref.at[call.block(j)], head_dim) for ref in (k, v))
        of_keys = call.tokens(j, segments)
        _, of_s = _weights(call, queries, keys, values, gradients, tokens, of_keys, *of_rows)
        return sums + triton.dot(of_s, keys)

    sums = jax.lax.fori_loop(*call.key_blocks(i), body, jnp.zeros(queries.shape, jnp.float32))
    _store(of_q, sums, head_dim)


def _key_kernel(
    call: _Call,
    head_dim: int,
    q: Any,
    k: Any,
    v: Any,
    segments: Any,
    of_out: Any,
    normaliser: Any,
    mean: Any,
    of_k: Any,
    of_v: Any,
) -> None:
    i = pl.program_id(0)
    keys, values, tokens = _load(k, head_dim), _load(v, head_dim), call.tokens(i, segments)
    length, group, _ = q.shape

    def head(n: Array, sums: Any) -> Any:
        def body(j: Array, sums: Any) -> Any:
            queries, gradients = (_load(ref.at[call.block(j), n], head_dim) for ref in (q, of_out))
            of_rows = (ref[n, call.block(j)] for ref in (normaliser, mean))
            of_queries = call.tokens(j, segments)
            p, of_s = _weights(call, queries, keys, values, gradients, of_queries, tokens, *of_rows)
            of_k, of_v = sums
            return (
                of_k + triton.dot(of_s, queries, trans_a=True),
                of_v + triton.dot(p, gradients, trans_a=True),
            )

        return jax.lax.fori_loop(*call.query_blocks(i, length // call.size), body, sums)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, group, head, (zeros, zeros))
    for ref, value in zip((of_k, of_v), sums, strict=True):
        _store(ref, value, head_dim)


class _Specs:
    """The parts of arrays that the programs of a grid (block of tokens, row, head) see."""

    def __init__(self, call: _Call, q: Array, k: Array):
        length, num_heads, head_dim = q.shape[1:]
        size, wide = call.size, max(16, pl.next_power_of_2(head_dim))
        group = num_heads // k.shape[2]
        self.block = pl.BlockSpec((None, size, None, wide), lambda i, b, n: (b, i, n, 0))
        self.of_rows = pl.BlockSpec((None, None, size), lambda i, b, n: (b, n, i))
        self.tokens = pl.BlockSpec((None, length), lambda i, b, n: (b, 0))
        self.head = pl.BlockSpec((None,), lambda i, b, n: (n,))
        # All keys, of the head that a query head shares; and all queries, of the heads that share a key head.
        self.keys = pl.BlockSpec((None, length, None, wide), lambda i, b, n: (b, 0, n // group, 0))
        self.queries = pl.BlockSpec((None, length, group, wide), lambda i, b, n: (b, 0, n, 0))
        self.of_queries = pl.BlockSpec((None, group, length), lambda i, b, n: (b, n, 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: _Call,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"],
) -> Float[Array, "B T N H"]:
    """Attention of one device."""
    return _forward(call, q, k, v, segments, sinks)[0]


def _forward(call: _Call, q: Array, k: Array, v: Array, segments: Array, sinks: Array) -> tuple[Array, Any]:
    specs = _Specs(call, q, k)
    batch, length, num_heads, _ = q.shape
    normaliser = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    out, normaliser = call.run(
        _forward_kernel,
        2,
        q,
        num_heads,
        [specs.block, specs.keys, specs.keys, specs.tokens, specs.head],
        (specs.block, specs.of_rows),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), normaliser),
    )(q, k, v, segments, sinks)
    return out, (q, k, v, segments, sinks, out, normaliser)


def _backward(call: _Call, saved: Any, of_out: Array) -> Any:
    q, k, v, segments, sinks, out, normaliser = saved
    specs, num_heads = _Specs(call, q, k), q.shape[2]
    # What each logit's gradient is less by: the mean gradient of the weights.
    mean = jnp.einsum("BTNH,BTNH->BNT", out, of_out, preferred_element_type=jnp.float32)
    args = (q, k, v, segments, of_out, normaliser, mean)
    of_q = call.run(
        _query_kernel,
        3,
        q,
        num_heads,
        [specs.block, specs.keys, specs.keys, specs.tokens, specs.block, specs.of_rows, specs.of_rows],
        specs.block,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*args)
    of_k, of_v = call.run(
        _key_kernel,
        4,
        q,
        k.shape[2],
        [specs.queries, specs.block, specs.block, specs.tokens, specs.queries] + [specs.of_queries] * 2,
        (specs.block, specs.block),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
    )(*args)
    of_sinks = -jnp.sum(jnp.exp(sinks[None, :, None] - normaliser) * mean, axis=(0, 2))
    return of_q, of_k, of_v, None, of_sinks


_attend.defvjp(_forward, _backward)
