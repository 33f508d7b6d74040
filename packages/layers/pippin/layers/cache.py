"""Key-value caches. Prefill, extension and decoding are one path: `extend` by any number of tokens."""

from typing import TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.layers.cache_config import FullCacheConfig, SlidingWindowCacheConfig
from pippin.layers.context import KeyValues


class CacheState(TypedDict):
    """The arrays of a cache. A slot without a key has position -1."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]


class FullCache(Module):
    """Keeps the key of position p in slot p."""

    Config = FullCacheConfig

    def __init__(self, cfg: FullCacheConfig):
        self.shape = (cfg.num_kv_heads, cfg.head_dim)

    def init(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> CacheState:
        """An empty cache for positions below `max_len`."""
        return _empty(batch_size, max_len, self.shape, dtype)

    def extend(
        self,
        state: CacheState,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple[CacheState, KeyValues]:
        """The cache with new tokens, and all that the new queries may attend to.

        Tokens at negative positions (padding) and at positions beyond the cache are not kept.
        """
        state = _write(state, k, v, positions, slots=positions)
        return state, _view(state)


class SlidingWindowCache(Module):
    """Keeps the key of position p in slot p mod W: the last W keys."""

    Config = SlidingWindowCacheConfig

    def __init__(self, cfg: SlidingWindowCacheConfig):
        self.shape = (cfg.num_kv_heads, cfg.head_dim)
        self.window = cfg.window

    def init(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> CacheState:
        """An empty cache; it holds `window` keys, or `max_len` if those are fewer."""
        return _empty(batch_size, min(max_len, self.window or max_len), self.shape, dtype)

    def extend(
        self,
        state: CacheState,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple[CacheState, KeyValues]:
        """As `FullCache.extend`. The positions of a row follow each other, padding aside."""
        size = state["positions"].shape[1]
        # Of more than `size` new tokens, only the last can stay: two writes to one slot would race.
        newest = jnp.max(positions, axis=1, keepdims=True)
        kept = jnp.where(positions > newest - size, positions, -1)
        after = _write(state, k, v, kept, slots=jnp.where(kept >= 0, kept % size, -1))
        if k.shape[1] == 1:
            return after, _view(after)
        # The first of several new queries still attends to keys that the last ones overwrite.
        before: CacheState = {
            "k": jnp.concatenate([state["k"], k.astype(state["k"].dtype)], axis=1),
            "v": jnp.concatenate([state["v"], v.astype(state["v"].dtype)], axis=1),
            "positions": jnp.concatenate([state["positions"], positions], axis=1),
        }
        return after, _view(before)


def _empty(batch_size: int, slots: int, shape: tuple[int, int], dtype: jnp.dtype) -> CacheState:
    return {
        "k": jnp.zeros((batch_size, slots, *shape), dtype),
        "v": jnp.zeros((batch_size, slots, *shape), dtype),
        "positions": jnp.full((batch_size, slots), -1, jnp.int32),
    }


def _write(state: CacheState, k: Array, v: Array, positions: Array, slots: Array) -> CacheState:
    size = state["positions"].shape[1]
    # A negative index would count from the end: send it beyond the cache, where "drop" drops it.
    slots = jnp.where(slots < 0, size, slots)
    rows = jnp.arange(slots.shape[0])[:, None]
    return {
        "k": state["k"].at[rows, slots].set(k.astype(state["k"].dtype), mode="drop"),
        "v": state["v"].at[rows, slots].set(v.astype(state["v"].dtype), mode="drop"),
        "positions": state["positions"].at[rows, slots].set(positions, mode="drop"),
    }


def _view(state: CacheState) -> KeyValues:
    return KeyValues(state["k"], state["v"], state["positions"], segment_ids=None, aligned=False)
