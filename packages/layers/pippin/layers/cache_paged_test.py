"""The paged cache, in models and by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.config_tree import override, replace
from pippin.core.errors import ConfigError
from pippin.layers import configs, reference
from pippin.layers.cache_paged import PagedState, assign_pages
from pippin.layers.testing import assert_exact, float64_fixture, normal, parts, positions

float64 = float64_fixture()

_K, _H, _PAGE = 2, 4, 4
_ATTENTION = configs.GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=_K, head_dim=_H)
_MODEL = configs.CausalLMConfig(
    vocab_size=24,
    dim=8,
    decoder=configs.RepeatConfig(
        num_layers=2,
        layer=configs.TransformerLayerConfig(
            attention=_ATTENTION, feed_forward=configs.FeedForwardConfig(hidden_dim=16)
        ),
    ),
)
_TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 11)), jnp.int32)


def _logits(cfg, tokens, cache=None, sizes=(5, 1, 1, 4)):
    """The logits of tokens that come in several parts, through a cache, and the cache."""
    m = parts(cfg)
    if cache is None:
        cache = m.method("init_cache", batch_size=2, max_len=13)(m.params)
    found, start = [], 0
    for size in sizes:
        logits, cache = m.method("extend")(m.params, tokens[:, start : start + size], cache)
        found.append(logits)
        start += size
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoder.layer.attention.window": 3}, {"decoder.layer.attention.sinks": True}],
    ids=["all", "window", "sinks"],
)
def test_a_model_with_a_paged_cache_continues_as_one_with_a_full_cache(changes):
    cfg = override(_MODEL, changes)
    expected, _ = _logits(cfg, _TOKENS)
    got, _ = _logits(configs.paged(page_size=_PAGE)(cfg), _TOKENS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # activations are of float32


def test_a_sliding_window_is_a_matter_of_the_mask_in_pages():
    cfg = replace(_MODEL, configs.FullCacheConfig, configs.SlidingWindowCacheConfig())
    cfg = override(cfg, {"decoder.layer.attention.window": 3})
    changed = configs.paged(page_size=_PAGE)(cfg)
    assert isinstance(changed.decoder.layer.attention.cache, configs.PagedCacheConfig)
    np.testing.assert_allclose(_logits(changed, _TOKENS)[0], _logits(cfg, _TOKENS)[0], rtol=1e-5, atol=1e-5)


def test_rows_read_a_page_that_another_row_wrote():
    cfg = configs.paged(page_size=_PAGE, num_pages=6)(_MODEL)
    m = parts(cfg)
    tokens = jnp.stack([_TOKENS[0], jnp.concatenate([_TOKENS[0, :4], _TOKENS[1, 4:]])])
    expected, _ = _logits(_MODEL, tokens)
    cache = m.method("init_cache", batch_size=2, max_len=13)(m.params)
    # Row 0 alone writes the first page, which row 1 begins with, too.
    alone = assign_pages(cache, jnp.asarray([[5, -1, -1, -1], [-1, -1, -1, -1]], jnp.int32))
    _, cache = m.method("extend")(m.params, tokens[:, :4], alone)
    cache = assign_pages(cache, jnp.asarray([[5, 0, 3, -1], [5, 2, 1, -1]], jnp.int32))
    got, _ = _logits(cfg, tokens[:, 4:], cache, sizes=(1, 6))
    np.testing.assert_allclose(got, expected[:, 4:], rtol=1e-5, atol=1e-5)


def test_tokens_at_given_positions_continue_as_those_in_order():
    cfg = configs.paged(page_size=_PAGE)(_MODEL)
    m = parts(cfg)
    expected, _ = _logits(_MODEL, _TOKENS)
    cache = m.method("init_cache", batch_size=2, max_len=13)(m.params)
    extend_at = m.method("extend_at")
    # Row 0 has 3 tokens in the first step and 2 in the second, row 1 has 1 and 3; the others are padding.
    for starts, stops in (((0, 0), (3, 1)), ((3, 1), (5, 4))):
        steps = np.arange(3)[None] + np.asarray(starts)[:, None]
        at = np.where(steps < np.asarray(stops)[:, None], steps, -1).astype(np.int32)
        tokens = jnp.take_along_axis(_TOKENS, jnp.maximum(at, 0), axis=1)
        last = np.asarray(stops, np.int32) - np.asarray(starts, np.int32) - 1
        got, cache = extend_at(m.params, tokens, jnp.asarray(at), cache, jnp.asarray(last))
        for row, stop in enumerate(stops):
            np.testing.assert_allclose(got[row], expected[row, stop - 1], rtol=1e-5, atol=1e-5)


def test_sums_of_hidden_states_are_of_all_tokens_but_padding():
    m = parts(configs.paged(page_size=_PAGE)(_MODEL))
    cache = m.method("init_cache", batch_size=2, max_len=13)(m.params)
    total, extend_at = np.zeros((2, 8)), m.method("extend_at")
    for start, stop in ((0, 3), (3, 5)):
        steps = start + np.arange(3)[None]
        at = jnp.asarray(np.repeat(np.where(steps < stop, steps, -1), 2, axis=0).astype(np.int32))
        tokens = jnp.take_along_axis(_TOKENS, jnp.maximum(at, 0), axis=1)
        last = jnp.full(2, stop - start - 1, jnp.int32)
        expected, _ = extend_at(m.params, tokens, at, cache, last)
        got, sums, cache = m.method("extend_and_sum_at")(m.params, tokens, at, cache, last)
        np.testing.assert_array_equal(got, expected)
        total += np.asarray(sums, np.float64)
    tokens, at = np.asarray(_TOKENS[:, :5]), np.asarray(positions(2, 5))
    hidden = reference.hidden_states(m.params, tokens, at, 2, head_dim=_H)
    np.testing.assert_allclose(total, np.sum(hidden, axis=1), rtol=1e-5, atol=1e-5)


def test_tokens_without_a_page_are_not_kept():
    cache = configs.PagedCacheConfig(num_kv_heads=_K, head_dim=_H, page_size=_PAGE, num_pages=3).build()
    state = assign_pages(cache.init(2, 8, jnp.dtype(jnp.float64)), jnp.asarray([[2, -1], [-1, 0]], jnp.int32))
    k, v = jnp.asarray(normal(2, 9, _K, _H, seed=1)), jnp.asarray(normal(2, 9, _K, _H, seed=2))
    at = positions(2, 9)
    at[0, 3] = -1  # padding
    after, kv = cache.extend(state, k, v, jnp.asarray(at))
    expected = np.zeros((3, _PAGE, 2 * _K, _H))
    for page, row, tokens in ((2, 0, [0, 1, 2]), (0, 1, [4, 5, 6, 7])):
        for token in tokens:
            expected[page, token % _PAGE, 0::2] = k[row, token]
            expected[page, token % _PAGE, 1::2] = v[row, token]
    assert_exact(after.pages, expected)
    assert kv.pages is after.pages and kv.tables is after.tables


def test_pages_are_assigned_to_all_layers_of_stacked_caches():
    cache = {"a": PagedState(jnp.zeros((3, 4, 2, 2, 2)), jnp.zeros((3, 2, 5), jnp.int32)), "b": jnp.ones(2)}
    tables = jnp.asarray([[1, 2], [3, -1]], jnp.int32)
    found = assign_pages(cache, tables)
    assert found["a"].tables.tolist() == [tables.tolist()] * 3
    assert found["b"] is cache["b"]


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"page_size \(12\) must be a power of two"):
        configs.PagedCacheConfig(page_size=12)
    with pytest.raises(ConfigError, match=r"num_pages \(0\) must be at least 1"):
        configs.PagedCacheConfig(num_pages=0)
    with pytest.raises(ConfigError, match="LinearConfig holds neither a cache nor a choice of kernels"):
        configs.paged()(configs.LinearConfig())


def test_an_int8_cache_holds_keys_and_values_within_half_a_step_of_each():
    cfg = configs.PagedCacheConfig(num_kv_heads=_K, head_dim=_H, page_size=_PAGE, int8=True)
    cache = cfg.build()
    k, v = (normal(2, 7, _K, _H, seed=i) * 10.0 ** np.arange(-3, 4).reshape(1, 7, 1, 1) for i in (1, 2))
    at = jnp.asarray(positions(2, 7))
    state, kv = cache.extend(cache.init(2, 8, jnp.dtype(jnp.float32)), jnp.asarray(k), jnp.asarray(v), at)
    assert state.pages.dtype == jnp.int8 and kv.scales is state.scales
    held = np.asarray(state.pages, np.float64) * np.asarray(state.scales, np.float64)[..., None]
    for row in range(2):
        found = held[np.asarray(state.tables)[row]].reshape(8, _K, 2, _H)[:7]
        for part, values in enumerate((k, v)):
            half = np.abs(values[row]).max(axis=-1, keepdims=True) / 127 / 2
            assert np.all(np.abs(found[:, :, part] - values[row]) <= 1.001 * half)
            assert np.abs(found[:, :, part] - values[row]).max() > 0


def test_a_model_with_an_int8_cache_continues_nearly_as_one_with_a_full_cache():
    expected, _ = _logits(_MODEL, _TOKENS)
    got, cache = _logits(configs.paged(page_size=_PAGE, int8=True)(_MODEL), _TOKENS)
    assert {a.dtype.name for a in jax.tree.leaves(cache["decoder"])} == {"int8", "int32", "float32"}
    error = np.linalg.norm(np.asarray(got) - np.asarray(expected)) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.02, error
