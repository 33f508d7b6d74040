"""Accumulated gradients equal those of one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.train.learner.accumulate import accumulate

# Sums of a few hundred float32 products in another order.
TOLERANCE = 1e-6


def _batch(rows: int = 8):
    rng = np.random.default_rng(0)
    weights = (rng.random((rows, 5)) < 0.6).astype(np.float32)
    return {
        "x": jnp.asarray(rng.standard_normal((rows, 5, 3)), jnp.float32),
        "loss_weights": jnp.asarray(weights),
    }


def _loss_and_grad(params):
    def loss(params, batch):
        per_target = jnp.sum(jnp.tanh(batch["x"] @ params["w"]) ** 2, axis=-1)
        weights = batch["loss_weights"]
        mean = jnp.sum(weights * per_target) / jnp.sum(weights)
        return mean, {"mean": mean}

    grad = jax.value_and_grad(loss, has_aux=True)
    return lambda batch: grad(params, batch)


def _params():
    return {"w": jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)), jnp.float32)}


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_equal_one_batch_though_their_targets_differ_in_number(microbatches):
    loss_and_grad, batch = _loss_and_grad(_params()), _batch()
    assert len(set(np.asarray(batch["loss_weights"]).sum(axis=1))) > 1
    expected = loss_and_grad(batch)
    actual = jax.jit(lambda b: accumulate(loss_and_grad, b, microbatches))(batch)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=TOLERANCE, atol=TOLERANCE), actual, expected
    )
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)


def test_a_microbatch_without_targets_adds_nothing():
    loss_and_grad, batch = _loss_and_grad(_params()), _batch(4)
    batch["loss_weights"] = batch["loss_weights"].at[1].set(0.0)  # its mean is 0/0
    expected, actual = loss_and_grad(batch), accumulate(loss_and_grad, batch, 4)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=TOLERANCE, atol=TOLERANCE), actual, expected
    )


def test_one_microbatch_is_the_call_itself():
    loss_and_grad, batch = _loss_and_grad(_params()), _batch()
    jax.tree.map(np.testing.assert_array_equal, accumulate(loss_and_grad, batch, 1), loss_and_grad(batch))


def test_gradients_in_bfloat16_are_summed_in_float32():
    values = jnp.asarray([1.0] + [2.0**-9] * 7, jnp.bfloat16)  # each too small to change 1 in bfloat16

    def loss_and_grad(batch):
        return (jnp.zeros(()), {}), {"w": jnp.sum(batch["x"])}

    batch = {"x": values, "loss_weights": jnp.ones(8)}
    _, grads = accumulate(loss_and_grad, batch, 8)
    assert grads["w"].dtype == jnp.bfloat16
    assert float(grads["w"]) == float(jnp.asarray((1 + 7 * 2.0**-9) / 8, jnp.bfloat16))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="8 rows cannot be split into 3 microbatches"):
        accumulate(_loss_and_grad(_params()), _batch(), 3)
