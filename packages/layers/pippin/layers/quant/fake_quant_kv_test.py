"""Attention to rounded keys and values against the rounding by hand, and against a cache of int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.layers.cache_paged import PagedCache
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import AttentionKernelConfig, ReferenceKernelConfig
from pippin.layers.kernel_paged_config import PagedBlockwiseKernelConfig, PagedCacheConfig
from pippin.layers.quant.fake_quant_config import FakeQuantKVKernelConfig
from pippin.layers.testing import normal, positions

_B, _T, _N, _K, _H = 2, 5, 4, 2, 8
_Q = jnp.asarray(normal(_B, _T, _N, _H, seed=1), jnp.float32)
_KEYS, _VALUES = (jnp.asarray(normal(_B, _T, _K, _H, seed=s), jnp.float32) for s in (2, 3))
_CTX = Context(jnp.asarray(positions(_B, _T)))
_LOGITS = Logits(_H**-0.5)
_EXACT = ReferenceKernelConfig()
_ROUNDING = FakeQuantKVKernelConfig(kernel=_EXACT)


def _rounded(values):
    values = np.asarray(values)
    step = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    return jnp.asarray(np.round(values / step) * step)


def _attend(keys, values, cfg: AttentionKernelConfig = _ROUNDING):
    kv = KeyValues(keys, values, _CTX.positions, None, aligned=True)
    return cfg.build()(_Q, kv, _CTX, _LOGITS)


def test_it_attends_to_the_rounded_vectors():
    expected = _attend(_rounded(_KEYS), _rounded(_VALUES), _EXACT)
    np.testing.assert_allclose(_attend(_KEYS, _VALUES), expected, rtol=1e-6, atol=1e-6)


def test_what_is_trained_is_what_a_cache_of_int8_serves():
    cache = PagedCache(PagedCacheConfig(num_kv_heads=_K, head_dim=_H, page_size=4, int8=True))
    _, paged = cache.extend(cache.init(_B, _T, jnp.dtype(jnp.float32)), _KEYS, _VALUES, _CTX.positions)
    served = PagedBlockwiseKernelConfig().build()(_Q, paged, _CTX, _LOGITS)
    np.testing.assert_allclose(_attend(_KEYS, _VALUES), served, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="it rounds keys that lie in no pages"):
        FakeQuantKVKernelConfig().build()(_Q, paged, _CTX, _LOGITS)


def test_gradients_are_those_of_the_kernel_at_the_rounded_vectors():
    def total(attend):
        return lambda k, v: jnp.sum(attend(k, v) * _Q)

    got = jax.grad(total(_attend), (0, 1))(_KEYS, _VALUES)
    plain = total(lambda k, v: _attend(k, v, _EXACT))
    expected = jax.grad(plain, (0, 1))(_rounded(_KEYS), _rounded(_VALUES))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
