"""Feed-forwards against NumPy in float64."""

import jax.numpy as jnp
import pytest
from flax import nnx

from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.linear_config import LinearConfig
from pippin.layers.testing import assert_exact, check_gradients, float64_fixture, normal, parts

_float64 = float64_fixture()


@pytest.mark.parametrize("activation", Activation)
def test_feed_forward_is_a_gated_product(activation):
    m = parts(FeedForwardConfig(input_dim=5, hidden_dim=7, activation=activation))
    x = normal(2, 3, 5)
    assert_exact(m.call(m.params, x), reference.feed_forward(m.params, x, activation.value))


def test_feed_forward_of_one_token_and_one_hidden_dim():
    m = parts(FeedForwardConfig(input_dim=2, hidden_dim=1))
    x = normal(1, 1, 2)
    assert_exact(m.call(m.params, x), reference.feed_forward(m.params, x))


def test_feed_forward_has_the_gradient_of_its_differences():
    m = parts(FeedForwardConfig(input_dim=3, hidden_dim=4))
    check_gradients(m.call, m.params, normal(1, 2, 3))


def test_each_projection_is_a_slot_of_its_own():
    m = parts(FeedForwardConfig(input_dim=3, hidden_dim=4, up_proj=LinearConfig(bias=True)))
    assert [name for name in m.params if "bias" in m.params[name]] == ["up_proj"]
    assert_exact(m.call(m.params, normal(1, 2, 3)), reference.feed_forward(m.params, normal(1, 2, 3)))


def test_feed_forward_keeps_bfloat16():
    m = parts(FeedForwardConfig(input_dim=4, hidden_dim=8), dtype=jnp.float32)
    assert m.call(m.params, jnp.ones((1, 2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_feed_forward_without_a_hidden_dim_names_it():
    with pytest.raises(ConfigError, match="hidden_dim of FeedForwardConfig is required"):
        FeedForwardConfig(input_dim=3).build(rngs=nnx.Rngs(0))
