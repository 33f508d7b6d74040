"""The chunked cross-entropy against the plain one in float64, and what it keeps in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.layers import reference
from pippin.layers.loss import chunked_cross_entropy
from pippin.layers.testing import assert_exact, check_gradients, equations, float64_fixture, normal

_float64 = float64_fixture()

_B, _T, _D, _V = 2, 6, 3, 7
_HIDDEN, _WEIGHT = normal(_B, _T, _D, seed=1), {"weight": normal(_D, _V, seed=2)}
_TARGETS = np.random.default_rng(3).integers(0, _V, (_B, _T)).astype(np.int32)
_WEIGHTS = np.array([[1, 1, 0, 1, 0.5, 1], [0, 0, 1, 1, 1, 0]], np.float32)


def _head(params: Any, hidden: Any) -> Any:
    return hidden @ params["weight"].astype(hidden.dtype)


def _loss(chunk: int, z_loss: float = 0.0) -> Any:
    def loss(params, hidden, targets=_TARGETS, weights=_WEIGHTS):
        arrays = (jnp.asarray(a) for a in (hidden, targets, weights))
        return chunked_cross_entropy(_head, params, *arrays, chunk=chunk, z_loss=z_loss)

    return jax.jit(loss)


def _plain(params, hidden, z_loss: float) -> Any:
    """The same with all logits at once, differentiated by JAX."""
    log_probabilities = jax.nn.log_softmax(_head(params, hidden))
    of_target = jnp.take_along_axis(log_probabilities, _TARGETS[..., None], axis=-1)[..., 0]
    squared = jnp.square(jax.nn.logsumexp(_head(params, hidden), axis=-1))
    return jnp.sum(_WEIGHTS.astype(np.float64) * (z_loss * squared - of_target))


@pytest.mark.parametrize("chunk", [1, 3, 4, 12, 1000])
def test_any_chunk_gives_the_sums_of_the_plain_cross_entropy(chunk):
    total, sums = _loss(chunk, z_loss=0.25)(_WEIGHT, _HIDDEN)
    logits = _HIDDEN @ _WEIGHT["weight"]
    cross_entropy = (_WEIGHTS * reference.cross_entropy(logits, _TARGETS)).sum()
    squared = (_WEIGHTS * reference.logsumexp(logits) ** 2).sum()
    assert_exact(total, cross_entropy + 0.25 * squared)
    assert_exact(sums.cross_entropy, cross_entropy)
    assert_exact(sums.squared_normaliser, squared)
    assert_exact(sums.correct, (_WEIGHTS * (logits.argmax(axis=-1) == _TARGETS)).sum())


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_gradients_are_those_of_the_plain_cross_entropy(chunk):
    # Times 3, as the gradients are taken before what follows the loss is known.
    chunked = jax.grad(lambda p, h: 3 * _loss(chunk, z_loss=0.25)(p, h)[0], argnums=(0, 1))(_WEIGHT, _HIDDEN)
    plain = jax.jit(jax.grad(lambda p, h: 3 * _plain(p, h, 0.25), argnums=(0, 1)))(_WEIGHT, _HIDDEN)
    jax.tree.map(assert_exact, chunked, plain)


def test_the_loss_has_the_gradient_of_its_differences():
    check_gradients(lambda p, h: _loss(4, z_loss=0.5)(p, h)[0], _WEIGHT, _HIDDEN)


def test_one_token_and_one_id():
    loss = _loss(8)(
        {"weight": np.ones((1, 1))}, np.ones((1, 1, 1)), np.zeros((1, 1), np.int32), np.ones((1, 1))
    )
    assert_exact(loss[0], 0.0)
    assert_exact(loss[1].correct, 1.0)


def test_tokens_without_weight_give_no_loss_and_no_gradient():
    def loss(p, h):
        return _loss(5)(p, h, _TARGETS, np.zeros_like(_WEIGHTS))[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(_WEIGHT, 1e30 * _HIDDEN)
    assert value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_gradients_of_bfloat16_states_are_summed_over_chunks_in_float32():
    params = {"weight": jnp.asarray(_WEIGHT["weight"], jnp.float32)}
    hidden = jnp.asarray(_HIDDEN, jnp.bfloat16)
    grads = jax.grad(lambda p, h: _loss(2)(p, h)[0], argnums=(0, 1))(params, hidden)
    assert grads[0]["weight"].dtype == jnp.float32
    assert grads[1].dtype == jnp.bfloat16
    total, sums = _loss(2)(params, hidden)
    assert total.dtype == sums.cross_entropy.dtype == jnp.float32


def test_no_array_holds_the_logits_of_all_tokens():
    batch, length, dim, vocab = 2, 32, 4, 64
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [((batch, length, dim), "float32"), ((batch, length), "int32")]
    ]
    params = {"weight": jax.ShapeDtypeStruct((dim, vocab), "float32")}
    gradient = jax.jit(jax.grad(lambda p, h, t, w: _loss(16)(p, h, t, w)[0], argnums=(0, 1)))
    traced = gradient.trace(params, *shapes, jax.ShapeDtypeStruct((batch, length), "float32"))
    sizes = [v.aval.size for e in equations(traced.jaxpr.jaxpr) for v in e.outvars]
    assert max(sizes) == 16 * vocab  # one chunk's logits: a quarter of all


def test_no_chunk_is_computed_twice():
    traced = jax.jit(jax.grad(lambda p, h: _loss(4)(p, h)[0])).trace(_WEIGHT, _HIDDEN)
    products = [e for e in equations(traced.jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 3  # the logits, and the gradients of both arguments
