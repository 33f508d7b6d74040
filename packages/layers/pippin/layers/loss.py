"""Cross-entropy over a large vocabulary, in chunks of tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pippin.core.sharding import num_shards
from pippin.layers.precision import at_least_float32

Head = Callable[[Any, Array], Array]  # (parameters, [B, T, D]) -> logits [B, T, V]
# Of hidden states, targets and weights: [n, B, T / n, ...], chunk after chunk.
Chunks = tuple[Array, Array, Array]


class LossSums(NamedTuple):
    """Sums over tokens, each times its weight. For the log: no gradient flows through them."""

    cross_entropy: Float[Array, ""]  # nats
    squared_normaliser: Float[Array, ""]  # logsumexp(logits)^2, for the z-loss
    correct: Float[Array, ""]  # tokens whose target has the largest logit


def chunked_cross_entropy(
    head: Head,
    head_params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LossSums]:
    """The sum of `weight * (cross-entropy + z_loss * logsumexp^2)`, and its parts.

    Logits are computed for about `chunk` tokens at a time and never kept: where the
    result is differentiated, each chunk's gradients are taken on the way forward,
    so no logit is computed twice either. Memory: O(chunk * V + V * D). It is
    differentiable by `head_params` and `hidden` alone.

    Args:
        head: makes logits of hidden states; differentiable in both arguments.
        head_params: what `head` is called with.
        hidden: the states that predict.
        targets: the id that each is to predict.
        weights: zero for a token that does not count.
        chunk: tokens at a time, but at least one of each row.
        z_loss: the weight of the squared normaliser.
    """
    batch, length = targets.shape
    count = min(length, -(-batch * length // chunk))
    chunks = tuple(_chunks(a, count) for a in (hidden, targets, weights))
    return _summed(head, z_loss, head_params, chunks)


def _chunks(a: Array, count: int) -> Array:
    """[B, T, ...] as [n, B, T / n, ...], with zeros, which have no weight, where n does not divide T.

    Chunk i holds the tokens i, i + n, i + 2n, ... of every row: a device that holds some
    rows, or a stretch of each row, has its share of every chunk.
    """
    batch, length, *rest = a.shape
    a = jnp.pad(a, [(0, 0), (0, -length % count)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(a.reshape(batch, -1, count, *rest), 2, 0)


def _chunk_loss(
    head: Head, z_loss: float, params: Any, hidden: Array, targets: Array, weights: Array
) -> tuple[Array, LossSums]:
    logits = head(params, hidden)
    logits = logits.astype(at_least_float32(logits.dtype))
    weights = weights.astype(logits.dtype)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = _at_targets(logits, targets)
    correct = jax.lax.stop_gradient(target >= jnp.max(logits, axis=-1)).astype(logits.dtype)
    sums = LossSums(
        cross_entropy=jnp.sum(weights * (normaliser - target)),
        squared_normaliser=jnp.sum(weights * jnp.square(normaliser)),
        correct=jnp.sum(weights * correct),
    )
    return sums.cross_entropy + z_loss * sums.squared_normaliser, sums


def _at_targets(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    if num_shards("vocab") == 1:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Each device has some of the vocabulary: a sum over what it has needs no logit of another one. XLA's partitioner
    # even fails on the lookup where rows are split too, inside a pipeline.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)


def _zero_loss(head: Head, z_loss: float, params: Any, chunks: Chunks) -> tuple[Array, LossSums]:
    first = [jax.eval_shape(lambda a: a[0], a) for a in chunks]
    shapes = jax.eval_shape(
        lambda params, *of_chunk: _chunk_loss(head, z_loss, params, *of_chunk), params, *first
    )
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _summed_value(head: Head, z_loss: float, params: Any, chunks: Chunks) -> tuple[Array, LossSums]:
    def body(total: Any, of_chunk: Any) -> Any:
        return jax.tree.map(jnp.add, total, _chunk_loss(head, z_loss, params, *of_chunk)), None

    return jax.lax.scan(body, _zero_loss(head, z_loss, params, chunks), chunks)[0]


_summed = jax.custom_vjp(_summed_value, nondiff_argnums=(0, 1))


def _summed_fwd(head: Head, z_loss: float, params: Any, chunks: Chunks) -> Any:
    def body(carry: Any, of_chunk: Any) -> Any:
        total, gradients = carry
        h, t, w = of_chunk
        loss, pull, sums = jax.vjp(
            lambda p, h: _chunk_loss(head, z_loss, p, h, t, w), params, h, has_aux=True
        )
        of_params, of_hidden = pull(jnp.ones_like(loss))
        total = jax.tree.map(jnp.add, total, (loss, sums))
        return (total, jax.tree.map(jnp.add, gradients, of_params)), of_hidden

    start = (_zero_loss(head, z_loss, params, chunks), jax.tree.map(jnp.zeros_like, params))
    (result, of_params), of_hidden = jax.lax.scan(body, start, chunks)
    return result, (of_params, of_hidden)


def _summed_bwd(head: Head, z_loss: float, saved: Any, cotangent: Any) -> Any:
    scale, _ = cotangent
    of_params, of_hidden = jax.tree.map(lambda g: g * scale.astype(g.dtype), saved)
    return of_params, (of_hidden, None, None)


_summed.defvjp(_summed_fwd, _summed_bwd)
