"""The Triton kernel, interpreted on a CPU, against NumPy and the reference kernel in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import TritonKernelConfig
from pippin.layers.kernel_testing import Case, Inputs, cases
from pippin.layers.position_config import ALiBiConfig
from pippin.layers.testing import positions

_INPUTS = Inputs(length=80, head_dim=24)  # no power of two
_KERNEL = TritonKernelConfig(interpret=True, block_size=16)
_CASES = cases(window=20, beyond=100)


@pytest.mark.parametrize("name", _CASES)
def test_it_computes_attention_and_its_gradient(name):
    _INPUTS.check(_KERNEL, _CASES[name])


@pytest.mark.parametrize("window", [1, 16, 17])
def test_windows_end_where_blocks_do_and_elsewhere(window):
    Inputs(length=48, head_dim=8).check(_KERNEL, Case(window=window))


def test_one_block_is_all_there_is():
    Inputs(length=16, head_dim=16).check(_KERNEL.set(block_size=64), Case(soft_cap=3.0))


def test_no_token_attends_to_padding_that_has_no_segment():
    _INPUTS.check_padding_without_segments(_KERNEL)


def test_bfloat16_keeps_its_dtype():
    _INPUTS.check_bfloat16(_KERNEL)


def test_blocks_that_no_query_sees_are_not_read():
    arrays = (jnp.asarray(a, jnp.float32) for a in _INPUTS.arrays(Case()))
    q, k, v, _ = arrays
    at = jnp.asarray(positions(2, 80))

    def result(v, window=None):
        kv = KeyValues(k, v, at, None, aligned=True)
        return _KERNEL.build()(q, kv, Context(at), Logits(1.0, window))

    # NaN survives a weight of zero, so that a finite result was computed without it.
    assert np.isfinite(result(v.at[:, 32:].set(np.nan))[:, :32]).all()
    assert np.isfinite(result(v.at[:, :16].set(np.nan), window=17)[:, 32:]).all()


def test_a_bias_is_refused_rather_than_left_out():
    q = jnp.ones((1, 16, 4, 16))
    kv = KeyValues(q, q, jnp.asarray(positions(1, 16)), None, aligned=True)
    bias = ALiBiConfig(num_heads=4, head_dim=16).build().bias
    with pytest.raises(ConfigError, match="TritonKernel: it adds no bias to logits"):
        _KERNEL.build()(q, kv, Context(kv.positions), Logits(1.0, bias=bias))
