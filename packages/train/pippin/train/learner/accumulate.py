"""Gradient accumulation: the gradient of a large batch, in the memory of a small one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pippin.core.errors import ConfigError

Batch = Any  # name -> array [B, ...]
LossAndGrad = Callable[[Batch], tuple[tuple[Float[Array, ""], Any], Any]]


def target_weight(batch: Batch) -> Float[Array, ""]:
    """The sum of a batch's loss weights: what its mean loss is divided by."""
    return jnp.sum(batch["loss_weights"])


def accumulate(
    loss_and_grad: LossAndGrad,
    batch: Batch,
    microbatches: int,
    weight: Callable[[Batch], Float[Array, ""]] = target_weight,
) -> tuple[tuple[Float[Array, ""], Any], Any]:
    """`((loss, metrics), grads)` of a batch, computed over one slice of its rows after the other.

    Losses, metrics and gradients are averaged with the slices' weights, in float32. So they equal those of
    the whole batch wherever they are means over it, each target counting by its weight. Terms that are not
    such means, as the load balance of a mixture of experts, become means over the slices.

    Args:
        loss_and_grad: gives `((loss, metrics), grads)` of a batch.
        batch: arrays of one leading size.
        microbatches: how many slices.
        weight: of a slice: what its loss is divided by.

    Raises:
        ConfigError: the slices would not be of one size.
    """
    if microbatches == 1:
        return loss_and_grad(batch)
    rows = {name: x.shape[0] for name, x in batch.items()}
    if any(n % microbatches for n in rows.values()):
        raise ConfigError(
            f"accumulate: a batch of {max(rows.values())} rows cannot be split into {microbatches} microbatches "
            "of one size. Set the learner's microbatches to a divisor of the batch size."
        )

    def slices(x: Array) -> Array:
        # Slice i takes rows i, i + n, ...: where devices hold contiguous rows, each has its share of every slice.
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    sliced = jax.tree.map(slices, batch)
    shapes = jax.eval_shape(loss_and_grad, jax.tree.map(lambda x: x[0], sliced))

    def add(total: tuple[Any, Array], piece: Batch) -> tuple[tuple[Any, Array], None]:
        sums, weights = total
        w = weight(piece).astype(jnp.float32)
        # A slice without targets has no mean: 0/0 there must not reach the sum.
        added = jax.tree.map(
            lambda s, v: s + jnp.where(w > 0, w * v.astype(jnp.float32), 0.0), sums, loss_and_grad(piece)
        )
        return (added, weights + w), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (sums, weights), _ = jax.lax.scan(add, (zeros, jnp.zeros([], jnp.float32)), sliced)
    return jax.tree.map(
        lambda s, shape: (s / jnp.where(weights > 0, weights, 1.0)).astype(shape.dtype), sums, shapes
    )
