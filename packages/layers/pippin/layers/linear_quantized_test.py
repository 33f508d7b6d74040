"""Products of 8-bit numbers against float64: within what 8 bits can hold, and exact where they hold all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.config_tree import traverse
from pippin.layers import configs
from pippin.layers.linear_config import (
    LinearConfig,
    MatmulType,
    QuantizedLinearConfig,
    lora,
    quantize_matmuls,
)
from pippin.layers.linear_quantized import quantized_product
from pippin.layers.testing import normal, parts

_X, _W = normal(2, 5, 64, seed=1), normal(64, 32, seed=2)
# Rounding to steps of max / 127 (int8) or to 3 bits after the point (fp8; 2 for gradients) errs by about a third of a
# step, and sums of 64 or 32 such errors as much as their terms. Twice what was seen.
_ERROR = {MatmulType.INT8: 0.02, MatmulType.FP8: 0.12}


def _error(got: object, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("matmul", MatmulType)
def test_the_product_and_its_gradients_err_by_what_8_bits_cannot_hold(matmul):
    of_y = normal(2, 5, 32, seed=3)
    y, pull = jax.vjp(
        lambda x, w: quantized_product(matmul, x, w),
        jnp.asarray(_X, jnp.float32),
        jnp.asarray(_W, jnp.float32),
    )
    of_x, of_w = pull(jnp.asarray(of_y, jnp.float32))
    assert 1e-4 < _error(y, _X @ _W) < _ERROR[matmul]
    assert 1e-4 < _error(of_x, of_y @ _W.T) < _ERROR[matmul]
    assert _error(of_w, np.einsum("bti,bto->io", _X, of_y)) < 1e-6  # in float32


def test_numbers_that_8_bits_hold_are_multiplied_exactly():
    x, w = np.sign(_X), np.sign(_W)
    y = quantized_product(MatmulType.FP8, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(y, x @ w, rtol=1e-6)


def test_rows_of_any_size_and_columns_of_any_size_keep_their_precision():
    x, w = _X * 10.0 ** np.arange(-4, 6).reshape(2, 5, 1), _W * 10.0 ** np.arange(-16, 16)
    y = quantized_product(MatmulType.INT8, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    for row in np.ndindex(2, 5):
        assert _error(y[row] / (x @ w)[row], np.ones(32)) < 0.5
        assert _error(np.asarray(y[row]) / 10.0 ** np.arange(-16, 16), (x @ _W)[row]) < 0.05


def test_the_program_multiplies_8_bit_numbers():
    def step(x, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(quantized_product(MatmulType.INT8, x, w))), (0, 1))(x, w)

    text = jax.jit(step).lower(jnp.asarray(_X, jnp.bfloat16), jnp.asarray(_W, jnp.float32)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert sum("xi8>" in line for line in products) == 2


def test_it_has_the_parameters_of_the_plain_map():
    dims = {"input_dim": 64, "output_dim": 32, "bias": True}
    plain, quantized = (parts(c(**dims), dtype=jnp.float32) for c in (LinearConfig, QuantizedLinearConfig))
    assert jax.tree.map(jnp.shape, plain.params) == jax.tree.map(jnp.shape, quantized.params)


def test_maps_of_attention_and_feed_forwards_are_quantized_and_no_others():
    layer = configs.TransformerLayerConfig(feed_forward=configs.MoEConfig())
    model = configs.CausalLMConfig(
        vocab_size=8,
        dim=8,
        decoder=configs.SequenceConfig(layers=(configs.TransformerLayerConfig(), layer)),
        head=LinearConfig(),
    )
    changed = quantize_matmuls(MatmulType.FP8)(lora(only="attention")(model))
    kinds = {path: type(cfg) for path, cfg in traverse(changed) if isinstance(cfg, LinearConfig)}
    plain = {path for path, kind in kinds.items() if kind is LinearConfig}
    assert plain == {"head", "decoder.layers.1.feed_forward.router.proj"}
    assert kinds["decoder.layers.0.attention.q_proj.base"] is QuantizedLinearConfig
    assert kinds["decoder.layers.0.feed_forward.up_proj"] is QuantizedLinearConfig
