"""Splash attention, interpreted on a CPU, against NumPy and the reference kernel in float64."""

import jax.numpy as jnp
import pytest

from pippin.core.errors import ConfigError
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import SplashKernelConfig
from pippin.layers.kernel_testing import Inputs, cases
from pippin.layers.position_config import ALiBiConfig
from pippin.layers.testing import positions

_INPUTS = Inputs(length=256, head_dim=16)
_KERNEL = SplashKernelConfig(interpret=True, block_size=128)
_CASES = cases(window=50, beyond=300)


@pytest.mark.parametrize("name", _CASES)
def test_splash_computes_attention_and_its_gradient(name):
    _INPUTS.check(_KERNEL, _CASES[name])


def test_no_token_attends_to_padding_that_has_no_segment():
    _INPUTS.check_padding_without_segments(_KERNEL)


def test_bfloat16_keeps_its_dtype():
    _INPUTS.check_bfloat16(_KERNEL)


def test_a_bias_is_refused_rather_than_left_out():
    q = jnp.ones((1, 128, 4, 16))
    kv = KeyValues(q, q, jnp.asarray(positions(1, 128)), None, aligned=True)
    bias = ALiBiConfig(num_heads=4, head_dim=16).build().bias
    with pytest.raises(ConfigError, match="SplashKernel: it adds no bias to logits"):
        _KERNEL.build()(q, kv, Context(kv.positions), Logits(1.0, bias=bias))
