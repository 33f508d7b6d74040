"""Tests of what is measured in linear maps: against the sums themselves, and through stacks and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import replace
from pippin.core.errors import QuantizationError
from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.export.compress.calibrate import calibrate
from pippin.export.compress.config import ObservedGroupedLinearConfig, ObservedLinearConfig, TextConfig
from pippin.export.compress.testing import make_tokenizer, random_params, tiny_config
from pippin.export.compress.text import batches, calibration_text
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.linear_config import MatmulType, quantize_matmuls
from pippin.layers.moe_config import MoEConfig
from pippin.layers.unrolled import unrolled


def gradients(cfg, x, *args):
    """What the parameters of a map get as gradients, and the map's own output gradient, of a loss that is any."""
    definition, params = split(cfg.build(rngs=nnx.Rngs(0)))
    x = jnp.asarray(x)

    def loss(params, shift):
        y = merge(definition, params)(x, *args) + shift
        return jnp.sum(jnp.sin(3 * y))

    y = merge(definition, params)(x, *args)
    return jax.grad(loss, argnums=(0, 1))(params, jnp.zeros_like(y))


def expected(x: np.ndarray, g: np.ndarray) -> dict[str, np.ndarray]:
    both = np.einsum("ti,tj->ij", x**2, g**2)
    return {"squared_inputs": (x**2).sum(0), "loss_inputs": both.sum(1), "loss_outputs": both.sum(0)}


def test_sums_are_of_all_tokens():
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    of_params, g = gradients(ObservedLinearConfig(input_dim=6, output_dim=4, bias=True), x)
    for name, values in expected(x.reshape(-1, 6), np.asarray(g).reshape(-1, 4)).items():
        np.testing.assert_allclose(of_params[name], values, rtol=1e-5)
    plain = x.reshape(-1, 6).T @ np.asarray(g).reshape(-1, 4)
    np.testing.assert_allclose(of_params["weight"], plain, rtol=1e-4, atol=1e-5)


def test_each_group_has_sums_of_its_own_rows():
    x = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    sizes = jnp.array([2, 0, 4], jnp.int32)  # the last three rows are in no group
    cfg = ObservedGroupedLinearConfig(num_groups=3, input_dim=6, output_dim=4)
    of_params, g = gradients(cfg, x, sizes)
    for group, rows in enumerate((slice(0, 2), slice(0, 0), slice(2, 6))):
        for name, values in expected(x[rows], np.asarray(g)[rows]).items():
            np.testing.assert_allclose(of_params[name][group], values, rtol=1e-5)


def _measured(tmp_path, cfg, params, tokens=48):
    text = batches(
        TextConfig(tokens=tokens, sequence_length=16), calibration_text(), make_tokenizer(tmp_path / "t")
    )
    steps = []
    return calibrate(cfg, params, text, lambda: steps.append(1)), text, len(steps)


def test_a_stack_is_measured_as_its_layers_are(tmp_path):
    cfg = tiny_config()
    params = random_params(cfg)
    stacked, text, steps = _measured(tmp_path, cfg, params)
    assert steps == len(text) == 3
    flat = calibrate(*unrolled(cfg, params), text)
    assert stacked.keys() == flat.keys()
    assert "decoder.layers.1.feed_forward.down_proj" in stacked
    assert len(stacked) == 14
    for path, of_map in stacked.items():
        for name in ("inputs", "loss_inputs", "loss_outputs"):
            np.testing.assert_allclose(getattr(of_map, name), getattr(flat[path], name), rtol=1e-3)


def test_experts_and_maps_of_8_bit_products_are_measured(tmp_path):
    cfg = quantize_matmuls(MatmulType.INT8)(tiny_config())
    cfg = replace(cfg, FeedForwardConfig, MoEConfig(num_experts=4, top_k=2))
    found, _, _ = _measured(tmp_path, cfg, random_params(cfg))
    assert found["decoder.layers.1.feed_forward.gate_proj"].inputs.shape == (4, 32)
    assert found["decoder.layers.1.attention.q_proj"].inputs.shape == (32,)
    for of_map in found.values():
        assert (of_map.inputs >= 0).all()
        assert of_map.loss_inputs.max() > 0
        np.testing.assert_allclose(of_map.loss_inputs.sum(), of_map.loss_outputs.sum(), rtol=1e-3)


def test_weights_that_make_nothing_finite_are_refused(tmp_path):
    cfg = tiny_config()
    flat = flatten_params(random_params(cfg))
    flat["decoder.layer.feed_forward.down_proj.weight"] = (
        flat["decoder.layer.feed_forward.down_proj.weight"] * 1e38
    )
    with pytest.raises(QuantizationError, match="on the calibration text is not finite"):
        _measured(tmp_path, cfg, unflatten_params(flat))
