"""Ring attention: sequences that the devices of a mesh share, where no device ever holds all keys."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.core.sharding import mesh_axes_of, num_shards, on_shards
from pippin.layers.context import Context, KeyValues
from pippin.layers.indexing import item, with_item
from pippin.layers.kernel import Logits, attention_shape, attention_specs, padded_segments, visible
from pippin.layers.kernel_config import RingKernelConfig, choose
from pippin.layers.precision import at_least_float32


class RingKernel(Module):
    """Computes attention while keys and values go round the devices that share a sequence.

    Of 2 c equal parts of a sequence on c devices, device i computes for the queries of parts i and 2 c - 1 - i,
    so that what causal masking leaves is the same work for all. Tokens come to the device that computes for them,
    and their results go back to where the mesh has them. Memory grows with what a device holds of the sequence.

    Source: Liu et al. 2023, arXiv:2310.01889, section 3 (the ring); Dao 2023, arXiv:2307.08691, section 3 (the online
    softmax and its backward pass); the order of the parts as in Llama 3, arXiv:2407.21783, section 3.3.2.
    """

    Config = RingKernelConfig

    def __init__(self, cfg: RingKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result.

        Raises:
            ConfigError: the config does not support the call.
        """
        choose(self.cfg, attention_shape(q, kv, ctx, logits))
        _, segments = padded_segments(ctx, kv)
        heads, kv_heads, tokens, head = attention_specs()
        ring = _Ring(
            mesh_axes_of(tokens[1]),
            num_shards("sequence"),
            logits.window,
            logits.soft_cap,
            self.cfg.block_size,
        )
        args = (q * logits.scale, kv.k.astype(q.dtype), kv.v.astype(q.dtype), kv.positions, segments)
        sinks = () if logits.sinks is None else (logits.sinks.astype(at_least_float32(q.dtype)),)
        specs = (heads, kv_heads, kv_heads, tokens, tokens, head)
        return on_shards(partial(_attend, ring), specs[: 5 + len(sinks)], heads)(*args, *sinks)


@dataclasses.dataclass(frozen=True)
class _Ring:
    axes: tuple[str, ...]  # of the mesh
    size: int  # devices
    window: int | None
    soft_cap: float | None
    block_size: int

    def next(self, tree: Any) -> Any:
        """What the device before this one has."""
        return self._send(tree, [(i + 1) % self.size for i in range(self.size)])

    def balance(self, tree: Any) -> Any:
        """Parts i and 2 c - 1 - i on device i, [2, B, t, ...], of parts 2 i and 2 i + 1, [B, 2 t, ...]."""
        halves = jax.tree.map(lambda a: jnp.stack(jnp.split(a, 2, axis=1)), tree)
        first, second = (self._send(item(halves, i), self._owners(i)) for i in range(2))
        even = jax.lax.axis_index(self.axes) % 2 == 0
        return jax.tree.map(lambda a, b: jnp.where(even, jnp.stack([a, b]), jnp.stack([b, a])), first, second)

    def restore(self, x: Float[Array, "two B t *rest"]) -> Float[Array, "B T *rest"]:
        """What `balance` was given."""
        even = jax.lax.axis_index(self.axes) % 2 == 0
        halves = [self._send(jnp.where(even, x[i], x[1 - i]), _inverse(self._owners(i))) for i in range(2)]
        return jnp.concatenate(halves, axis=1)

    def _owners(self, half: int) -> list[int]:
        """Which device computes for the first or second half of each device's tokens."""
        parts = (2 * i + half for i in range(self.size))
        return [part if part < self.size else 2 * self.size - 1 - part for part in parts]

    def _send(self, tree: Any, to: list[int]) -> Any:
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, list(enumerate(to))), tree)


def _inverse(permutation: list[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)


# Positions and segments.
_Tokens = tuple[Int[Array, "..."], Int[Array, "..."]]


def _attend(
    ring: _Ring,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention for the tokens of one device."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    grouped = q.reshape(*q.shape[:2], num_kv_heads, num_heads // num_kv_heads, q.shape[3])
    if sinks is None:
        sinks = jnp.full((num_heads,), -jnp.inf, at_least_float32(q.dtype))
    sinks = sinks.reshape(1, 1, 1, num_kv_heads, -1)
    out = _zigzag(ring, *ring.balance((grouped, k, v)), sinks, ring.balance((positions, segments)))
    return ring.restore(out).reshape(q.shape)


# The arguments of what follows: q is [2, B, t, K, G, H], k and v are [2, B, t, K, H], sinks [1, 1, 1, K, G].
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _zigzag(ring: _Ring, q: Array, k: Array, v: Array, sinks: Array, tokens: _Tokens) -> Array:
    return _forward(ring, q, k, v, sinks, tokens)[0]


def _forward(ring: _Ring, q: Array, k: Array, v: Array, sinks: Array, tokens: _Tokens) -> tuple[Array, Any]:
    wide = at_least_float32(q.dtype)
    lowest = jnp.finfo(wide).min / 2
    # For each query: the largest logit so far, the sum of weights, and the sum of weighted values.
    state = (
        jnp.full(q.shape[:-1], lowest, wide),
        jnp.zeros(q.shape[:-1], wide),
        jnp.zeros(q.shape, wide),
    )

    def meet(state: Any, queries: Any, keys: Any) -> Any:
        """The state of one half of the queries, after it met one half of some keys."""

        def block(of_block: Any) -> Any:
            (top, total, out), (q, of_q) = of_block
            k, v, of_k = keys
            s, mask = _logits(ring, q, of_q, k, of_k)
            new = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.where(mask, jnp.exp(s - new[..., None]), 0.0)
            kept = jnp.exp(top - new)
            values = jnp.einsum("BTKGS,BSKH->BTKGH", p.astype(q.dtype), v, preferred_element_type=wide)
            return new, total * kept + jnp.sum(p, axis=-1), out * kept[..., None] + values

        _, state = _over_blocks(
            ring, lambda carry, of_block: (carry, block(of_block)), None, (state, queries)
        )
        return state

    def turn(state: Any, i: Array, keys: Any) -> Any:
        early = item(state, 1), (item(q, 1), item(tokens, 1))
        state = with_item(state, 1, meet(*early, item(keys, 0)))
        half = _same_half(ring, i)
        return with_item(
            state, half, meet(item(state, half), (item(q, half), item(tokens, half)), item(keys, half))
        )

    def body(carry: Any, i: Array) -> Any:
        state, keys = carry
        keys = ring.next(keys)
        return (turn(state, i, keys), keys), None

    keys = (k, v, tokens)
    state = with_item(state, 0, meet(item(state, 0), (q[0], item(tokens, 0)), item(keys, 0)))
    state = turn(state, jnp.zeros((), jnp.int32), keys)
    (state, _), _ = jax.lax.scan(body, (state, keys), jnp.arange(1, ring.size, dtype=jnp.int32))
    top, total, out = state
    largest = jnp.maximum(top, sinks)
    total = total * jnp.exp(top - largest) + jnp.exp(sinks - largest)
    out = out * jnp.exp(top - largest)[..., None] / jnp.where(total > 0, total, 1.0)[..., None]
    normaliser = largest + jnp.log(jnp.where(total > 0, total, 1.0))
    return out.astype(q.dtype), normaliser


def _forward_saving(
    ring: _Ring, q: Array, k: Array, v: Array, sinks: Array, tokens: _Tokens
) -> tuple[Array, Any]:
    out, normaliser = _forward(ring, q, k, v, sinks, tokens)
    return out, (q, k, v, sinks, tokens, out, normaliser)


def _backward(ring: _Ring, saved: Any, of_out: Array) -> Any:
    q, k, v, sinks, tokens, out, normaliser = saved
    wide = normaliser.dtype
    # What each logit's gradient is less by: the mean gradient of the weights.
    mean = jnp.sum(out.astype(wide) * of_out.astype(wide), axis=-1)
    queries = (q, tokens, of_out, normaliser, mean)

    def meet(of_q: Array, of_keys: Any, queries: Any, keys: Any) -> Any:
        """The gradients of one half of the queries and of one half of some keys, with those of their meeting."""
        k, v, of_k = keys

        def block(of_keys: Any, of_block: Any) -> Any:
            of_q, (q, tokens, of_out, normaliser, mean) = of_block
            s, mask = _logits(ring, q, tokens, k, of_k)
            p = jnp.where(mask, jnp.exp(s - normaliser[..., None]), 0.0)
            of_p = jnp.einsum("BTKGH,BSKH->BTKGS", of_out, v, preferred_element_type=wide)
            of_s = p * (of_p - mean[..., None])
            if ring.soft_cap is not None:
                of_s *= jnp.where(mask, 1 - jnp.square(s / ring.soft_cap), 0.0)
            p, of_s = p.astype(q.dtype), of_s.astype(q.dtype)
            of_q += jnp.einsum("BTKGS,BSKH->BTKGH", of_s, k, preferred_element_type=wide)
            of_new = (
                jnp.einsum("BTKGS,BTKGH->BSKH", of_s, q, preferred_element_type=wide),
                jnp.einsum("BTKGS,BTKGH->BSKH", p, of_out, preferred_element_type=wide),
            )
            return jax.tree.map(jnp.add, of_keys, of_new), of_q

        return _over_blocks(ring, block, of_keys, (of_q, queries))

    def turn(of_q: Array, of_keys: Any, i: Array, keys: Any) -> Any:
        new, late = meet(of_q[1], item(of_keys, 0), item(queries, 1), item(keys, 0))
        of_keys, of_q = with_item(of_keys, 0, new), with_item(of_q, 1, late)
        half = _same_half(ring, i)
        new, of_half = meet(item(of_q, half), item(of_keys, half), item(queries, half), item(keys, half))
        return with_item(of_q, half, of_half), with_item(of_keys, half, new)

    def body(carry: Any, i: Array) -> Any:
        of_q, of_keys, keys = carry
        of_keys, keys = ring.next((of_keys, keys))  # gradients go round with their keys
        return (*turn(of_q, of_keys, i, keys), keys), None

    keys = (k, v, tokens)
    of_q, of_keys = jnp.zeros(q.shape, wide), (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
    new, early = meet(of_q[0], item(of_keys, 0), item(queries, 0), item(keys, 0))
    of_keys, of_q = with_item(of_keys, 0, new), with_item(of_q, 0, early)
    of_q, of_keys = turn(of_q, of_keys, jnp.zeros((), jnp.int32), keys)
    (of_q, of_keys, _), _ = jax.lax.scan(
        body, (of_q, of_keys, keys), jnp.arange(1, ring.size, dtype=jnp.int32)
    )
    of_k, of_v = ring.next(of_keys)  # the last step home
    of_sinks = -jnp.sum(jnp.exp(sinks - normaliser) * mean, axis=(0, 1, 2), keepdims=True)
    return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), of_sinks, (None, None)


_zigzag.defvjp(_forward_saving, _backward)


def _same_half(ring: _Ring, i: Array) -> Array:
    """Which half of the queries meets its like: the early one, where the keys come from a device before this one.

    The late queries see all early keys, beside. At step 0 keys are the device's own: both halves meet their like, the
    early one by a call of its own.
    """
    me = jax.lax.axis_index(ring.axes)
    return jnp.where((i > 0) & (me >= i), 0, 1)


def _logits(ring: _Ring, q: Array, of_q: _Tokens, k: Array, of_k: _Tokens) -> tuple[Array, Array]:
    """Capped logits [B, t, K, G, s], and which of them count."""
    s = jnp.einsum("BTKGH,BSKH->BTKGS", q, k, preferred_element_type=at_least_float32(q.dtype))
    if ring.soft_cap is not None:
        s = ring.soft_cap * jnp.tanh(s / ring.soft_cap)
    keys = KeyValues(k, k, *of_k, aligned=False)
    mask = visible(*of_q, keys, ring.window)[:, :, None, None, :]
    return jnp.where(mask, s, jnp.finfo(s.dtype).min / 2), mask


def _over_blocks(ring: _Ring, f: Any, carry: Any, queries: Any) -> Any:
    """`f(carry, block)` -> (carry, result) over blocks of queries, [B, t, ...]: the last carry, and all results."""
    length = jax.tree.leaves(queries)[0].shape[1]
    size = next(n for n in range(min(ring.block_size, length), 0, -1) if length % n == 0)
    count = length // size

    def apart(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(a.shape[0], count, -1, *a.shape[2:]), 1, 0)

    def together(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], length, *a.shape[3:])

    carry, results = jax.lax.scan(f, carry, jax.tree.map(apart, queries))
    return carry, jax.tree.map(together, results)
