"""Linear maps and embeddings against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.linear_config import (
    EmbeddingConfig,
    FanInInitConfig,
    GroupedLinearConfig,
    LinearConfig,
    LoRALinearConfig,
    NormalInitConfig,
)
from pippin.layers.testing import assert_exact, check_gradients, float64_fixture, normal, parts

_float64 = float64_fixture()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (5,)])
def test_linear_is_a_product_and_a_sum(bias, shape):
    m = parts(LinearConfig(input_dim=5, output_dim=4, bias=bias))
    x = normal(*shape)
    assert_exact(m.call(m.params, x), reference.linear(m.params, x))


def test_linear_has_the_gradient_of_its_differences():
    m = parts(LinearConfig(input_dim=3, output_dim=2, bias=True))
    check_gradients(m.call, m.params, normal(2, 3))


def test_linear_of_one_dim_scales():
    m = parts(LinearConfig(input_dim=1, output_dim=1))
    assert_exact(m.call(m.params, np.array([[2.0]])), 2 * m.params["weight"])


def test_linear_without_a_size_names_it():
    with pytest.raises(ConfigError, match="output_dim of LinearConfig is required"):
        LinearConfig(input_dim=3).build(rngs=nnx.Rngs(0))


def test_initial_values_have_the_variance_that_their_config_says():
    # Of 20,000 draws, the standard deviation is known to 0.5%; five times that is allowed.
    def stddev(init):
        return float(jnp.std(init.build()(jax.random.key(0), (200, 100), 200)))

    assert stddev(FanInInitConfig(scale=2.0)) == pytest.approx((2 / 200) ** 0.5, rel=0.025)
    assert stddev(NormalInitConfig(stddev=0.5)) == pytest.approx(0.5, rel=0.025)


def test_embedding_looks_up_rows_and_attends_to_them():
    m = parts(EmbeddingConfig(vocab_size=6, dim=4))
    table, ids, x = np.asarray(m.params["weight"]), np.array([[0, 5], [2, 2]], np.int32), normal(2, 3, 4)
    assert_exact(m.method("__call__", dtype=jnp.dtype(jnp.float64))(m.params, ids), table[ids])
    assert_exact(m.method("attend")(m.params, x), np.einsum("btd,vd->btv", x, table))


def test_embedding_tied_to_the_output_has_the_gradients_of_both_uses():
    m = parts(EmbeddingConfig(vocab_size=4, dim=3))
    look_up, attend = m.method("__call__", dtype=jnp.dtype(jnp.float64)), m.method("attend")
    ids = np.array([1, 1, 3], np.int32)
    check_gradients(lambda p: attend(p, jnp.sin(look_up(p, ids))), m.params)


def test_embedding_of_an_id_beyond_the_vocabulary_is_nan():
    m = parts(EmbeddingConfig(vocab_size=1, dim=3))
    vectors = m.call(m.params, np.array([0, 1], np.int32))
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True]


@pytest.mark.parametrize("sizes", [(2, 0, 3, 1), (0, 0, 6, 0), (6, 0, 0, 0), (0, 0, 0, 6)])
def test_grouped_linear_maps_each_group_by_its_own_weight(sizes):
    m = parts(GroupedLinearConfig(num_groups=4, input_dim=3, output_dim=2))
    x, group = normal(6, 3), np.repeat(np.arange(4), sizes)
    expected = np.stack([row @ np.asarray(m.params["weight"])[g] for row, g in zip(x, group, strict=True)])
    assert_exact(m.call(m.params, x, np.array(sizes, np.int32)), expected)


def test_grouped_linear_has_the_gradient_of_its_differences():
    m = parts(GroupedLinearConfig(num_groups=3, input_dim=2, output_dim=2))
    sizes = np.array([2, 0, 1], np.int32)
    check_gradients(lambda p, x: m.call(p, x, sizes), m.params, normal(3, 2))


def test_lora_adds_a_scaled_product_of_two_narrow_maps():
    m = parts(LoRALinearConfig(input_dim=5, output_dim=4, rank=2, alpha=6.0, base=LinearConfig(bias=True)))
    x, p = normal(2, 5), m.params
    low_rank = np.asarray(p["down"]) @ np.asarray(p["up"])
    assert_exact(m.call(p, x), reference.linear(p["base"], x) + 6 / 2 * x @ low_rank)
    check_gradients(m.call, p, x)


def test_lora_of_rank_one_starts_as_its_base():
    lora = LoRALinearConfig(input_dim=5, output_dim=4, rank=1).build(rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(2, 5))
    np.testing.assert_array_equal(lora(x), lora.base(x))
    assert np.any(lora.down[...])  # or nothing would ever be learned


def test_lora_refuses_a_rank_of_zero():
    with pytest.raises(ConfigError, match=r"rank \(0\) must be at least 1"):
        LoRALinearConfig(rank=0)


@pytest.mark.parametrize("kind", [LinearConfig(bias=True), LoRALinearConfig(rank=2)])
def test_maps_keep_bfloat16_with_float32_parameters(kind):
    m = parts(kind.set(input_dim=4, output_dim=3), dtype=jnp.float32)
    assert m.call(m.params, jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_lookups_and_groups_keep_bfloat16():
    embedding = parts(EmbeddingConfig(vocab_size=3, dim=4), dtype=jnp.float32)
    look_up = embedding.method("__call__", dtype=jnp.dtype(jnp.bfloat16))
    vectors = look_up(embedding.params, np.array([0, 2], np.int32))
    assert vectors.dtype == embedding.method("attend")(embedding.params, vectors).dtype == jnp.bfloat16
    grouped = parts(GroupedLinearConfig(num_groups=2, input_dim=4, output_dim=3), dtype=jnp.float32)
    assert grouped.call(grouped.params, vectors, np.array([1, 1], np.int32)).dtype == jnp.bfloat16
