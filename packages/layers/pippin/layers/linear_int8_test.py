"""Maps with int8 weights against float64: within half a step of each number, whatever the size of rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import traverse
from pippin.core.module import merge, parameter_infos, split
from pippin.layers import configs, linear_int8
from pippin.layers.linear_config import (
    EmbeddingConfig,
    Int8EmbeddingConfig,
    Int8LinearConfig,
    LinearConfig,
    int8_weights,
    lora,
)
from pippin.layers.linear_int8 import with_int8_weights
from pippin.layers.testing import normal, parts
from pippin.layers.unrolled import unrolled, untied

_I, _O = 64, 32
_X, _W = normal(2, 5, _I, seed=1), normal(_I, _O, seed=2)
_LAYER = configs.TransformerLayerConfig(
    attention=configs.GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    feed_forward=configs.FeedForwardConfig(hidden_dim=48),
)
_LM = configs.CausalLMConfig(vocab_size=24, dim=32, decoder=configs.RepeatConfig(layer=_LAYER, num_layers=2))


def _quantized(w, scale_of):
    """int8 numbers of a weight [rows, columns] and what one of them is worth, of each row."""
    scale = np.float32(np.abs(w).max(axis=1) / 127)
    scale_of["scale"] = jnp.asarray(scale)
    return jnp.asarray(np.round(w / scale[:, None]), jnp.int8)


def _linear(w, bias=None):
    """The map of a float weight [I, O], as a function of x."""
    cfg = Int8LinearConfig(input_dim=w.shape[0], output_dim=w.shape[1], bias=bias is not None)
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    params = {}
    params["weight"] = _quantized(w.T, params)
    if bias is not None:
        params["bias"] = jnp.asarray(bias, jnp.float32)
    return jax.jit(lambda x: merge(definition, params)(x))


@pytest.mark.parametrize("columns", [1.0, 10.0 ** np.linspace(-6, 6, _O)], ids=["alike", "of any size"])
@pytest.mark.parametrize(
    "rows", [1.0, 10.0 ** np.arange(-5, 5).reshape(2, 5, 1)], ids=["alike", "of any size"]
)
def test_the_product_errs_by_half_a_step_of_each_number(rows, columns):
    x, w = np.float32(_X * rows), np.float32(_W * columns)
    y = np.asarray(_linear(w)(jnp.asarray(x)), np.float64)
    expected = x.astype(np.float64) @ w.astype(np.float64)
    of_w = np.abs(w).max(axis=0) / 127 / 2  # half a step of a weight
    of_x = (
        np.abs(x).max(axis=-1, keepdims=True) / 127 / 256 * 0.51
    )  # and of a token's 16 bits, whose quotient is rounded
    bound = np.abs(x).sum(axis=-1, keepdims=True) * of_w + of_x * np.abs(w).sum(axis=0) + _I * of_x * of_w
    # Sums are of integers; what is rounded to float32 is a handful of products of each output.
    bound += 8 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w))
    assert np.all(np.abs(y - expected) <= bound)
    assert np.abs(y - expected).max() > 0


def test_accelerators_multiply_floats_which_errs_by_the_weights_alone(monkeypatch):
    x = jnp.asarray(_X, jnp.float32)
    monkeypatch.setattr(linear_int8, "platform_in_use", lambda: "tpu")
    y = np.asarray(_linear(_W)(x), np.float64)
    of_w = np.abs(_W).max(axis=0) / 127 / 2
    bound = np.abs(_X).sum(axis=-1, keepdims=True) * of_w + 1e-5
    assert np.all(np.abs(y - _X @ _W) <= bound)
    assert _linear(_W)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_bias_is_added_and_the_dtype_kept():
    bias = normal(_O, seed=3)
    plain, biased = _linear(_W)(jnp.asarray(_X, jnp.float32)), _linear(_W, bias)(jnp.asarray(_X, jnp.float32))
    np.testing.assert_allclose(biased, np.asarray(plain) + bias, atol=1e-5)
    assert _linear(_W)(jnp.asarray(_X, jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_row_has_the_same_bits_beside_any_others():
    linear = _linear(normal(576, 1536, seed=4))
    x = jnp.asarray(normal(256, 576, seed=5), jnp.float32)
    alone = np.asarray(linear(x[:4]))
    for count in (1, 7, 32, 64, 256):
        np.testing.assert_array_equal(np.asarray(linear(x[:count]))[:4], alone[:count])


def test_a_row_that_is_not_finite_spoils_no_other_and_zeros_stay_zeros():
    x = np.float32(_X.copy())
    x[0, 0, 3], x[0, 1, 3], x[0, 2] = np.nan, np.inf, 0
    y = np.asarray(_linear(_W)(jnp.asarray(x)))
    assert not np.isfinite(y[0, 0]).any() and not np.isfinite(y[0, 1]).any()
    assert np.all(y[0, 2] == 0)
    np.testing.assert_array_equal(y[1], np.asarray(_linear(_W)(jnp.asarray(_X, jnp.float32)))[1])


def test_an_embedding_is_within_half_a_step():
    cfg = configs.CausalLMConfig(vocab_size=16, dim=_I, decoder=configs.SequenceConfig(layers=()))
    made, params = with_int8_weights(*untied(cfg, _numpy(parts(cfg, dtype=jnp.float32).params)))
    table = np.asarray(parts(cfg, dtype=jnp.float32).params["embedding"]["weight"], np.float64)
    embedding = made.embedding.set(vocab_size=16, dim=_I)
    definition, _ = split(nnx.eval_shape(lambda: embedding.build(rngs=nnx.Rngs(0))))
    module = merge(definition, jax.tree.map(jnp.asarray, params["embedding"]))
    got = np.asarray(module(jnp.arange(16)), np.float64)
    half = np.abs(table).max(axis=1, keepdims=True) / 127 / 2
    assert np.all(np.abs(got - table) <= 1.001 * half)
    x = jnp.asarray(normal(3, _I, seed=7), jnp.float32)
    np.testing.assert_allclose(module.attend(x), np.asarray(x) @ got.T, rtol=1e-4, atol=1e-4)


def _numpy(params):
    return jax.tree.map(np.asarray, params)


def test_a_trained_model_is_made_int8_and_says_nearly_the_same():
    m = parts(_LM, dtype=jnp.float32)
    cfg, params = with_int8_weights(*untied(*unrolled(_LM, _numpy(m.params))))
    infos = parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    # The very arrays that the model wants.
    jax.tree.map(
        lambda info, a: (info.shape, info.dtype) == (a.shape, a.dtype) or pytest.fail(info.path),
        infos,
        params,
    )
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)), jnp.int32)
    got = jax.nn.log_softmax(merge(definition, jax.tree.map(jnp.asarray, params))(tokens))
    expected = jax.nn.log_softmax(merge(m.definition, m.params)(tokens))
    error = np.linalg.norm(np.asarray(got) - np.asarray(expected)) / np.linalg.norm(expected)
    # Two layers of weights with errors of a third of a hundredth each: twice what was seen.
    assert 1e-5 < error < 0.03, error
    kinds = {
        a.dtype.name: sum(b.nbytes for b in jax.tree.leaves(params) if b.dtype == a.dtype)
        for a in jax.tree.leaves(params)
    }
    assert kinds["int8"] > 4 * kinds["float32"]


def test_arrays_of_jax_give_the_numbers_of_numpys():
    plain = untied(*unrolled(_LM, _numpy(parts(_LM, dtype=jnp.float32).params)))
    _, here = with_int8_weights(*plain)
    _, there = with_int8_weights(plain[0], jax.tree.map(jnp.asarray, plain[1]))
    # But for a number in the middle of two steps, whose scale differs in the last bit.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a * 1.0, b * 1.0, rtol=1e-6, atol=a.dtype == np.int8),
        here,
        _numpy(there),
    )


def test_routers_and_experts_stay_and_a_lora_has_an_int8_base():
    layer = configs.TransformerLayerConfig(feed_forward=configs.MoEConfig())
    model = configs.CausalLMConfig(
        vocab_size=8,
        dim=8,
        decoder=configs.SequenceConfig(layers=(configs.TransformerLayerConfig(), layer)),
        head=LinearConfig(),
    )
    changed = int8_weights(lora(only="attention")(model))
    kinds = {
        path: type(cfg) for path, cfg in traverse(changed) if isinstance(cfg, LinearConfig | EmbeddingConfig)
    }
    assert {path for path, kind in kinds.items() if kind is LinearConfig} == {
        "decoder.layers.1.feed_forward.router.proj"
    }
    assert kinds["embedding"] is Int8EmbeddingConfig and kinds["head"] is Int8LinearConfig
    assert kinds["decoder.layers.0.attention.q_proj.base"] is Int8LinearConfig
