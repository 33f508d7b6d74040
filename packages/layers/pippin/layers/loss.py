"""Cross-entropy over a large vocabulary, in chunks of tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Head = Callable[[Any, Array], Array]  # (parameters, [M, D]) -> logits [M, V]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over tokens, each times its weight."""

    cross_entropy: Float[Array, ""]  # nats
    squared_normaliser: Float[Array, ""]  # logsumexp(logits)^2, for the z-loss
    correct: Float[Array, ""]  # tokens whose largest logit is the target's


def chunked_cross_entropy(
    head: Head,
    head_params: Any,
    hidden: Float[Array, "M D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LossSums]:
    """The sum of `weight * (cross-entropy + z_loss * logsumexp^2)`, and its parts.

    Logits are computed for `chunk` tokens at a time and never kept: where the
    result is differentiated, each chunk's gradients are taken on the way forward,
    so no logit is computed twice either. Memory: O(chunk * V + V * D).

    Args:
        head: makes logits of hidden states; differentiable in both arguments.
        head_params: what `head` is called with.
        hidden: of M tokens.
        targets: the id that each token is to predict.
        weights: float32; zero for a token that does not count.
        chunk: tokens at a time; M is padded to a multiple of it.
        z_loss: the weight of the squared normaliser.
    """
    hidden, targets, weights = _pad(chunk, hidden, targets, weights)
    return _summed(head, chunk, z_loss, head_params, hidden, targets, weights)


def _chunk_loss(
    head: Head, z_loss: float, params: Any, hidden: Array, targets: Array, weights: Array
) -> tuple[Array, LossSums]:
    logits = head(params, hidden)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    correct = jax.lax.stop_gradient(target >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    sums = LossSums(
        cross_entropy=jnp.sum(weights * (normaliser - target)),
        squared_normaliser=jnp.sum(weights * jnp.square(normaliser)),
        correct=jnp.sum(weights * correct),
    )
    return sums.cross_entropy + z_loss * sums.squared_normaliser, sums


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _summed_value(
    head: Head, chunk: int, z_loss: float, params: Any, hidden: Array, targets: Array, weights: Array
) -> tuple[Array, LossSums]:
    def body(total: Any, of_chunk: Any) -> Any:
        return jax.tree.map(jnp.add, total, _chunk_loss(head, z_loss, params, *of_chunk)), None

    zero = jax.eval_shape(
        lambda: _chunk_loss(head, z_loss, params, hidden[:chunk], targets[:chunk], weights[:chunk])
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), zero)
    return jax.lax.scan(body, zero, _chunks(chunk, hidden, targets, weights))[0]


_summed = jax.custom_vjp(_summed_value, nondiff_argnums=(0, 1, 2))


def _summed_fwd(
    head: Head, chunk: int, z_loss: float, params: Any, hidden: Array, targets: Array, weights: Array
) -> Any:
    def body(carry: Any, of_chunk: Any) -> Any:
        total, gradients = carry
        h, t, w = of_chunk
        loss, pull, sums = jax.vjp(
            lambda p, h: _chunk_loss(head, z_loss, p, h, t, w), params, h, has_aux=True
        )
        of_params, of_hidden = pull(jnp.ones_like(loss))
        return (
            jax.tree.map(jnp.add, total, (loss, sums)),
            jax.tree.map(jnp.add, gradients, of_params),
        ), of_hidden

    zero = jax.eval_shape(
        lambda: _chunk_loss(head, z_loss, params, hidden[:chunk], targets[:chunk], weights[:chunk])
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), zero)
    start = (zero, jax.tree.map(jnp.zeros_like, params))
    (result, of_params), of_hidden = jax.lax.scan(body, start, _chunks(chunk, hidden, targets, weights))
    return result, (of_params, of_hidden.reshape(hidden.shape), targets, weights)


def _summed_bwd(head: Head, chunk: int, z_loss: float, saved: Any, cotangent: Any) -> Any:
    of_params, of_hidden, targets, weights = saved
    scale, _ = cotangent  # the sums are for the log: no gradient flows through them

    def times(g: Array) -> Array:
        return g * scale.astype(g.dtype)

    return jax.tree.map(times, of_params), times(of_hidden), None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _pad(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    missing = -arrays[0].shape[0] % chunk
    return tuple(jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in arrays)
