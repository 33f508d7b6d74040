"""Caches: keys and values that go in by any split come out as if they had come at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.layers import reference
from pippin.layers.cache_config import FullCacheConfig, SlidingWindowCacheConfig
from pippin.layers.context import Context
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import ReferenceKernelConfig
from pippin.layers.testing import assert_exact, float64_fixture, normal, positions

_float64 = float64_fixture()

_LENGTH, _H = 11, 2
_CHUNKS = (1, 3, 5)  # few sizes, as each is compiled: smaller and larger than the windows below

CACHES = {
    "full": (FullCacheConfig, None),
    "full, window of 4": (FullCacheConfig, 4),
    "sliding, no window": (SlidingWindowCacheConfig, None),
    "sliding, window of 1": (SlidingWindowCacheConfig, 1),
    "sliding, window of 4": (SlidingWindowCacheConfig, 4),
    "sliding, window beyond the tokens": (SlidingWindowCacheConfig, 30),
}


@functools.cache
def _extend(name: str) -> tuple[Any, Any]:
    """A cache's `init`, and a function that extends it and attends from the new tokens."""
    kind, window = CACHES[name]
    cache = kind(num_kv_heads=1, head_dim=_H, window=window).build()
    kernel = ReferenceKernelConfig().build()

    @jax.jit
    def extend(state: Any, q: Any, k: Any, v: Any, at: Any) -> Any:
        state, kv = cache.extend(state, k, v, at)
        return state, kernel(q, kv, Context(at), Logits(_H**-0.5, window))

    return cache.init, extend


@functools.cache
def _expected(window: int | None) -> tuple[np.ndarray, ...]:
    q, k, v = (normal(2, _LENGTH, 1, _H, seed=s) for s in (1, 2, 3))
    at = positions(2, _LENGTH)
    return q, k, v, reference.attend(q, k, v, reference.causal(at, None, window))


# Each step: its size, how many tokens each of the two rows has for it, and whether they come first in it.
_STEPS = st.lists(
    st.tuples(st.sampled_from(_CHUNKS), st.tuples(st.integers(0, 5), st.integers(0, 5)), st.booleans()),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=25, derandomize=True, deadline=None)
@given(steps=_STEPS)
def test_any_split_of_ragged_rows_attends_as_the_whole(name, steps):
    init, extend = _extend(name)
    q, k, v, expected = _expected(CACHES[name][1])
    state = init(2, _LENGTH, jnp.dtype(jnp.float64))
    done = [0, 0]
    for size, wanted, first in steps:
        at = np.full((2, size), -1, np.int32)
        for row in range(2):
            count = min(wanted[row], size, _LENGTH - done[row])
            where = slice(0, count) if first else slice(size - count, size)
            at[row, where] = np.arange(done[row], done[row] + count)
            done[row] += count
        rows = np.arange(2)[:, None]
        # Padding takes the last token's vectors: whatever it is, it must not be seen.
        state, out = extend(state, q[rows, at], k[rows, at], v[rows, at], at)
        assert np.isfinite(out).all()
        assert_exact(np.asarray(out)[at >= 0], expected[rows, at][at >= 0])


def test_a_sliding_window_cache_holds_a_window_and_no_more():
    cache = SlidingWindowCacheConfig(num_kv_heads=1, head_dim=_H, window=4).build()
    shape = jax.eval_shape(lambda: cache.init(2, 1000, jnp.dtype(jnp.float32)))
    assert shape["k"].shape == (2, 4, 1, _H)
    assert cache.init(2, 3, jnp.dtype(jnp.float32))["k"].shape == (2, 3, 1, _H)


def test_of_more_tokens_than_a_window_the_last_stay_whatever_the_order_of_the_writes():
    cache = SlidingWindowCacheConfig(num_kv_heads=1, head_dim=_H, window=2).build()
    at = jnp.array([[5, 4, 3, 2, 1, 0]], jnp.int32)  # on a GPU, writes to one slot come in any order
    k = jnp.asarray(normal(1, 6, 1, _H))
    state, _ = jax.jit(cache.extend)(cache.init(1, 10, jnp.dtype(jnp.float64)), k, k, at)
    assert state["positions"].tolist() == [[4, 5]]
    assert_exact(state["k"], k[:, [1, 0]])


def test_a_full_cache_drops_what_lies_beyond_it_and_keeps_the_rest():
    cache = FullCacheConfig(num_kv_heads=1, head_dim=_H).build()
    k = jnp.asarray(normal(1, 4, 1, _H))
    at = jnp.array([[0, -1, 1, 7]], jnp.int32)
    state, _ = jax.jit(cache.extend)(cache.init(1, 3, jnp.dtype(jnp.float64)), k, k, at)
    assert state["positions"].tolist() == [[0, 1, -1]]
    assert_exact(state["k"], np.stack([k[0, 0], k[0, 2], np.zeros_like(k[0, 0])])[None])


@pytest.mark.parametrize("kind", [FullCacheConfig, SlidingWindowCacheConfig])
def test_a_cache_keeps_the_dtype_that_it_was_made_with(kind):
    cache = kind(num_kv_heads=1, head_dim=_H, window=2).build()
    k = jnp.ones((1, 3, 1, _H), jnp.float32)
    state = cache.init(1, 8, jnp.dtype(jnp.bfloat16))
    state, kv = cache.extend(state, k, k, jnp.array([[0, 1, 2]], jnp.int32))
    assert {state["k"].dtype, state["v"].dtype, kv.k.dtype} == {jnp.dtype(jnp.bfloat16)}
