"""Rounded weights against NumPy, the gradients that they pass on, and models that are trained with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError
from pippin.layers import configs
from pippin.layers.linear_config import LinearConfig, LoRALinearConfig, lora
from pippin.layers.quant.fake_quant import palette, rounded
from pippin.layers.quant.fake_quant_config import (
    FakeQuantEmbeddingConfig,
    FakeQuantKVKernelConfig,
    FakeQuantLinearConfig,
    fake_quantized,
)
from pippin.layers.testing import float64_fixture, normal, parts

_float64 = float64_fixture()

_W = normal(6, 5, seed=3)
_FACTOR = np.array([0.3, 0.9])

LM = configs.CausalLMConfig(
    vocab_size=32,
    dim=16,
    decoder=configs.RepeatConfig(
        num_layers=2,
        layer=configs.TransformerLayerConfig(
            attention=configs.GroupedQueryAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
            feed_forward=configs.FeedForwardConfig(hidden_dim=32),
        ),
    ),
)


def _expected(weight, factor, bits):
    """By comparing with each level."""
    most = (2**bits - 1) / 2
    result = np.empty_like(weight)
    for group, f in zip(np.split(np.arange(len(weight)), len(factor)), factor, strict=True):
        levels = np.arange(-most, most + 1) * f * np.abs(weight[group]).max() / most
        nearest = np.abs(weight[group][..., None] - levels).argmin(-1)
        result[group] = levels.astype(np.float16)[nearest]
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_each_weight_becomes_the_nearest_level_of_its_group(bits):
    assert np.array_equal(rounded(jnp.asarray(_W), jnp.asarray(_FACTOR), bits), _expected(_W, _FACTOR, bits))


def test_two_bits_are_the_levels_of_the_report():
    weight = jnp.asarray([[3.0, -0.1, 0.4, -1.2, 1.1]])
    assert rounded(weight, jnp.asarray([0.5]), 2).tolist() == [[1.5, -0.5, 0.5, -1.5, 1.5]]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_group_of_zeros_stays_zero(bits):
    weight = jnp.asarray(_W).at[:3].set(0.0)
    factor = jnp.asarray(_FACTOR)
    assert not np.asarray(rounded(weight, factor, bits))[:3].any()
    assert not np.asarray(palette(weight, factor, bits)[1])[0].any()
    gradient = jax.grad(lambda w: rounded(w, factor, bits).sum())(weight)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[:3], 1, rtol=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_palette_holds_what_the_layer_computes_with(bits):
    weight, factor = jnp.asarray(_W, jnp.float32), jnp.asarray(_FACTOR, jnp.float32)
    indices, luts = palette(weight, factor, bits)
    assert indices.dtype == np.uint8 and luts.dtype == np.float16
    of_row = np.asarray(luts, np.float32)[np.arange(6) // 3]
    kept = np.take_along_axis(of_row, np.asarray(indices, int), axis=1)
    assert np.array_equal(rounded(weight, factor, bits), kept)


def test_gradients_pass_inside_the_outer_levels_and_reach_the_factor():
    weight, factor = jnp.asarray(_W), jnp.asarray(_FACTOR)
    upstream = normal(6, 5, seed=4)
    of_weight, of_factor = jax.grad(lambda w, f: jnp.sum(rounded(w, f, 2) * upstream), (0, 1))(weight, factor)
    largest = np.abs(_W).reshape(2, -1).max(1)
    scale = np.repeat(_FACTOR * largest / 1.5, 3)[:, None]
    units = _W / scale
    inside = np.abs(units) <= 1.5
    assert np.allclose(of_weight, np.where(inside, upstream, 0), rtol=1e-12)
    levels = np.clip(np.floor(np.clip(units, -1.5, 1.5)) + 0.5, -1.5, 1.5)
    of_scale = upstream * (levels - np.where(inside, units, 0))  # Esser et al. 2019, equation 3
    assert np.allclose(of_factor, of_scale.reshape(2, -1).sum(1) * largest / 1.5, rtol=1e-12)


def test_a_linear_map_rounds_groups_of_outputs():
    m = parts(FakeQuantLinearConfig(input_dim=5, output_dim=6, group_size=3, bias=True))
    x = normal(2, 5)
    p = {name: np.asarray(values) for name, values in m.params.items()}
    expected = x @ _expected(p["weight"].T, p["factor"], 2).T + p["bias"]
    np.testing.assert_allclose(m.call(m.params, jnp.asarray(x)), expected, rtol=1e-12)


def test_an_embedding_rounds_groups_of_ids_both_ways():
    m = parts(FakeQuantEmbeddingConfig(vocab_size=6, dim=5, group_size=2))
    table = _expected(np.asarray(m.params["weight"]), np.asarray(m.params["factor"]), 4)
    ids, x = jnp.array([[5, 0]], jnp.int32), normal(2, 5)
    found = m.method("__call__", dtype=jnp.dtype(jnp.float64))(m.params, ids)
    assert np.array_equal(found, table[[[5, 0]]])
    np.testing.assert_allclose(m.method("attend")(m.params, jnp.asarray(x)), x @ table.T, rtol=1e-12)


def test_the_modifier_changes_what_will_be_compressed():
    cfg = fake_quantized(bits=2, embedding_bits=4)(lora(rank=2)(LM.set(head=LinearConfig())))
    kinds = [type(c) for _, c in traverse(cfg)]
    assert LinearConfig not in kinds and kinds.count(LoRALinearConfig) == kinds.count(FakeQuantLinearConfig)
    assert cfg.embedding == FakeQuantEmbeddingConfig(bits=4)
    kernel = cfg.decoder.layer.attention.kernel
    assert isinstance(kernel, FakeQuantKVKernelConfig)
    assert fake_quantized()(cfg) == cfg


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (lambda: FakeQuantLinearConfig(output_dim=20), r"group_size \(16\) must divide output_dim \(20\)"),
        (lambda: FakeQuantEmbeddingConfig(vocab_size=9, group_size=2), r"divide vocab_size \(9\)"),
        (lambda: FakeQuantLinearConfig(bits=5), r"bits \(5\) must be one of 1, 2, 3, 4, 6, 8"),
    ],
)
def test_what_has_no_table_is_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        cfg()
