"""Normalisations against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.testing import assert_exact, check_gradients, float64_fixture, normal, parts

_float64 = float64_fixture()


@pytest.mark.parametrize("shape, eps", [((2, 3, 5), 1e-5), ((1, 1, 1), 1e-5), ((4,), 0.5)])
def test_rms_norm_divides_by_the_root_mean_square(shape, eps):
    m = parts(RMSNormConfig(dim=shape[-1], eps=eps))
    x = normal(*shape)
    assert_exact(m.call(m.params, x), reference.rms_norm(m.params, x, eps))


def test_rms_norm_has_the_gradient_of_its_differences():
    m = parts(RMSNormConfig(dim=4))
    check_gradients(m.call, m.params, normal(2, 4))


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    m = parts(RMSNormConfig(dim=4))
    check_gradients(lambda x: m.call(m.params, 1e-3 * x), np.zeros((1, 4)))
    assert not np.any(m.call(m.params, np.zeros((1, 4))))


def test_rms_norm_of_bfloat16_is_that_of_float32_rounded_once():
    m = parts(RMSNormConfig(dim=64), dtype=jnp.float32)
    x = jnp.asarray(100 * normal(8, 64), jnp.bfloat16)
    result = m.call(m.params, x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, m.call(m.params, x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rms_norm_without_a_dim_names_it():
    with pytest.raises(ConfigError, match="dim of RMSNormConfig is required"):
        RMSNormConfig().build(rngs=nnx.Rngs(0))
