"""Attention layers against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder, SharedKVAttentionConfig
from pippin.layers.cache_config import SlidingWindowCacheConfig
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel_config import BlockwiseKernelConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import NoPEConfig, RoPEConfig
from pippin.layers.testing import (
    Parts,
    assert_exact,
    check_gradients,
    float64_fixture,
    normal,
    parts,
    positions,
)

_float64 = float64_fixture()

_D, _H, _T = 6, 4, 5
_X = normal(2, _T, _D)

_PLAIN = GroupedQueryAttentionConfig(input_dim=_D, num_heads=4, num_kv_heads=2, head_dim=_H)
_NORMED = _PLAIN.set(qk_norm=RMSNormConfig())
_BEFORE, _AFTER = QKNormOrder.BEFORE_ROTATION, QKNormOrder.AFTER_ROTATION


def _attend(m: Parts, x: Any = _X, at: Any = None, segments: Any = None) -> Any:
    at = jnp.asarray(positions(*x.shape[:2]) if at is None else at)
    return m.call(m.params, x, Context(at, None if segments is None else jnp.asarray(segments)))


@pytest.mark.parametrize(
    "cfg, options",
    [
        (_PLAIN, {}),
        (_NORMED.set(qk_norm_order=_BEFORE), {"norm_first": True}),
        (_NORMED.set(qk_norm_order=_AFTER), {}),
        (_PLAIN.set(num_kv_heads=1, position=NoPEConfig()), {"theta": None}),
        (_PLAIN.set(position=RoPEConfig(theta=100.0), window=2), {"theta": 100.0, "window": 2}),
        (
            _NORMED.set(num_kv_heads=4, soft_cap=1.5, sinks=True, kernel=BlockwiseKernelConfig(block_size=2)),
            {"soft_cap": 1.5},
        ),
        (_PLAIN.set(num_heads=1, num_kv_heads=1, head_dim=2, window=1), {"head_dim": 2, "window": 1}),
    ],
    ids=["plain", "norm before", "norm after", "one kv head, NoPE", "window", "cap and sinks", "one head"],
)
def test_attention_equals_its_formula(cfg, options):
    m = parts(cfg)
    out = _attend(m)
    expected, (k, v) = reference.attention(m.params, _X, positions(2, _T), **{"head_dim": _H, **options})
    assert_exact(out.x, expected)
    assert_exact(out.kv.k, k)
    assert_exact(out.kv.v, v)
    assert out.cache is None


def test_the_order_of_norm_and_rotation_matters_only_where_scales_differ_within_a_pair():
    before, after = (parts(_NORMED.set(qk_norm_order=order)) for order in QKNormOrder)
    assert np.abs(np.asarray(_attend(before).x - _attend(after).x)).max() > 1e-3
    for m in (before, after):
        for norm in ("q_norm", "k_norm"):
            m.params[norm]["scale"] = jnp.full((_H,), 1.5)
    assert_exact(_attend(before).x, _attend(after).x)


def test_attention_has_the_gradient_of_its_differences():
    m = parts(_NORMED.set(num_heads=2, num_kv_heads=1, sinks=True, soft_cap=2.0))
    check_gradients(lambda p, x: m.call(p, x, Context(jnp.asarray(positions(1, 3)))).x, m.params, _X[:1, :3])


def test_one_token_gets_its_own_value():
    m = parts(_PLAIN)
    value = reference.linear(m.params["v_proj"], _X[:, :1]).reshape(2, 1, 2, _H)
    expected = reference.linear(m.params["o_proj"], np.repeat(value, 2, axis=2).reshape(2, 1, -1))
    assert_exact(_attend(m, _X[:, :1]).x, expected)


@pytest.mark.parametrize("window", [None, 2])
def test_packed_documents_attend_as_separate_ones(window):
    m = parts(_NORMED.set(window=window, kernel=BlockwiseKernelConfig(block_size=2)))
    packed = _attend(m, _X[:1], at=[[0, 1, 2, 0, 1]], segments=np.array([[1, 1, 1, 2, 2]])).x
    assert_exact(packed[:, :3], _attend(m, _X[:1, :3]).x)
    assert_exact(packed[:, 3:], _attend(m, _X[:1, 3:]).x)


@pytest.mark.parametrize("cfg", [_NORMED, _NORMED.set(window=2, cache=SlidingWindowCacheConfig())])
def test_attention_by_parts_through_a_cache_equals_the_whole(cfg):
    m = parts(cfg)
    cache = m.method("init_cache", batch_size=2, max_len=_T, dtype=jnp.dtype(jnp.float64))(m.params)
    outs = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        at = jnp.asarray(positions(2, _T)[:, start:stop])
        out = m.call(m.params, _X[:, start:stop], Context(at), cache)
        cache = out.cache
        outs.append(out.x)
    assert_exact(np.concatenate(outs, axis=1), _attend(m).x)


def test_shared_attention_equals_attention_with_the_keys_and_values_that_it_reads():
    source, reader = parts(_NORMED), parts(_shared(qk_norm=RMSNormConfig()), seed=2)
    kv = _attend(source).kv
    read = _read(reader, kv)
    expected, _ = reference.attention(
        reader.params, _X, positions(2, _T), head_dim=_H, kv=(np.asarray(kv.k), np.asarray(kv.v))
    )
    assert_exact(read.x, expected)
    assert read.kv.k is not None and not {"k_proj", "v_proj"} & reader.params.keys()


def test_shared_attention_has_the_gradient_of_its_differences_in_what_it_reads():
    m, at = parts(_shared(num_heads=2, num_kv_heads=1)), jnp.asarray(positions(1, 3))

    @jax.jit
    def read(p, x, k, v):
        return m.call(p, x, Context(at, kv=KeyValues(k, v, at, None, aligned=True))).x

    check_gradients(read, m.params, _X[:1, :3], normal(1, 3, 1, _H, seed=5), normal(1, 3, 1, _H, seed=6))


def _shared(**fields: Any) -> Config:
    base = SharedKVAttentionConfig(input_dim=_D, num_heads=4, num_kv_heads=2, head_dim=_H)
    return base.set(**fields)


def _read(m: Parts, kv: KeyValues, x: Any = _X) -> Any:
    return m.call(m.params, x, Context(jnp.asarray(positions(*x.shape[:2])), kv=kv))


def test_attention_keeps_bfloat16():
    m = parts(_NORMED.set(sinks=True, soft_cap=3.0), dtype=jnp.float32)
    out = _attend(m, jnp.asarray(_X, jnp.bfloat16))
    assert out.x.dtype == out.kv.k.dtype == out.kv.v.dtype == jnp.bfloat16
    # The rounding of eight bits, through five products: the result has values up to about 3.
    exact = _attend(m, jnp.asarray(_X, jnp.float32)).x
    np.testing.assert_allclose(out.x.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.parametrize("kind", [GroupedQueryAttentionConfig, SharedKVAttentionConfig])
@pytest.mark.parametrize(
    "fields, match",
    [
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
        (
            {"num_heads": 6, "num_kv_heads": 0},
            r"num_heads \(6\) .* num_kv_heads \(0\). Set num_kv_heads to a divisor of 6",
        ),
        ({"window": 0}, r"window \(0\) must be at least 1: a token sees itself"),
        ({"soft_cap": 0.0}, r"soft_cap \(0.0\) must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, fields, match):
    with pytest.raises(ConfigError, match=kind.__name__.removesuffix("Config") + ": " + match):
        kind(**fields)


def test_shared_attention_without_a_layer_to_read_says_where_it_belongs():
    with pytest.raises(ConfigError, match="no layer before it made any. Put it behind"):
        _attend(parts(_shared()))


def test_a_missing_size_is_named():
    with pytest.raises(ConfigError, match="head_dim of GroupedQueryAttentionConfig is required"):
        GroupedQueryAttentionConfig(input_dim=4, num_heads=2, num_kv_heads=1).build(rngs=nnx.Rngs(0))
