"""Activations and normalisations, as coremltools writes them, against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.export.mil.errors import PackageError
from pippin.export.mil.ops_activation import sigmoid
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.testing import Case, check_cases

_RNG = np.random.default_rng(0)
X = _RNG.normal(0, 2, (2, 3, 8)).astype(np.float16)
_JAX_TOLERANCE = 2e-6  # of float32


def test_activations(tmp_path):
    x = jnp.asarray(X, jnp.float32)
    two = {"alpha": np.float16(0.25), "beta": np.float16(0.5)}
    cases = [
        Case("relu", {"x": X}, np.asarray(jax.nn.relu(x))),
        Case("relu6", {"x": X}, np.asarray(jax.nn.relu6(x))),
        Case("sigmoid", {"x": X}, np.asarray(jax.nn.sigmoid(x))),
        Case("silu", {"x": X}, np.asarray(jax.nn.silu(x))),
        Case("softplus", {"x": X}, np.asarray(jax.nn.softplus(x))),
        Case("softsign", {"x": X}, np.asarray(jax.nn.soft_sign(x))),
        Case("leaky_relu", {"x": X}, np.asarray(jax.nn.leaky_relu(x, 0.25)), {"alpha": np.float16(0.25)}),
        Case("elu", {"x": X}, np.asarray(jax.nn.elu(x, 0.25)), {"alpha": np.float16(0.25)}),
        Case("gelu", {"x": X}, np.asarray(jax.nn.gelu(x, approximate=False)), {"mode": "EXACT"}),
        Case("gelu", {"x": X}, np.asarray(jax.nn.gelu(x)), {"mode": "TANH_APPROXIMATION"}),
        Case("gelu", {"x": X}, np.asarray(x * jax.nn.sigmoid(1.702 * x)), {"mode": "SIGMOID_APPROXIMATION"}),
        Case("sigmoid_hard", {"x": X}, np.asarray(jnp.clip(0.25 * x + 0.5, 0, 1)), two),
        Case("linear_activation", {"x": X}, np.asarray(0.25 * x + 0.5), two),
        Case("scaled_tanh", {"x": X}, np.asarray(0.25 * jnp.tanh(0.5 * x)), two),
        Case("softmax", {"x": X}, np.asarray(jax.nn.softmax(x, axis=1)), {"axis": 1}),
        Case("softmax", {"x": X}, np.asarray(jax.nn.softmax(x)), {"axis": -1}),
    ]
    check_cases(tmp_path, cases, _JAX_TOLERANCE)


def test_normalisations(tmp_path):
    x = jnp.asarray(X, jnp.float32)
    gamma, beta = _RNG.normal(1, 0.2, (2, 8)).astype(np.float16)
    small = float(np.float16(1e-2))
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + small)
    l2 = x / jnp.sqrt((x**2).sum() + small)
    epsilon = {"epsilon": np.float16(small)}
    cases = [
        Case("layer_norm", {"x": X}, np.asarray(normed), {"axes": [-1], **epsilon}),
        Case(
            "layer_norm",
            {"x": X},
            np.asarray(normed) * gamma.astype(np.float32) + beta.astype(np.float32),
            {"axes": [-1], "gamma": gamma, "beta": beta, **epsilon},
        ),
        Case("l2_norm", {"x": X}, np.asarray(l2), epsilon),
    ]
    check_cases(tmp_path, cases, _JAX_TOLERANCE)


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(sigmoid(np.float64([-600.0, 0.0, 600.0]))[1:], [0.5, 1.0])


def test_a_row_without_anything_to_see_is_nan_as_the_formula_says():
    with np.errstate(invalid="ignore"):
        result = RULES["softmax"].function(Tensor(np.float32([-np.inf, -np.inf]), "float16"))
    assert np.isnan(result.values).all()


def test_an_unknown_gelu_is_named():
    with pytest.raises(PackageError, match="its mode is 'ERF'; known are EXACT"):
        RULES["gelu"].function(Tensor(X, "float16"), mode=Tensor(np.array("ERF", object), "string"))
