"""Optimizers on optax: gradients to updates, in float32, with a treatment for each parameter.

An optimizer (interface "optimizer") is built with the treatments of the
trainable parameters and offers `init(params) -> state` and
`update(grads, state, params, rate, schedule) -> (updates, state)`, all trees of
the trainable parameters' structure; a state holds such trees and counts. `rate`
is the peak learning rate and `schedule` the ratio of it that this update takes:
optimizers differ in which of them they multiply the decay by.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pippin.core.module import Params
from pippin.train.learner.config import AdamWConfig, AfmOptimizerConfig
from pippin.train.learner.rules import Treatment

State = Any  # a tree of arrays


class AdamW:
    """An update is `-schedule * rate * (lr_scale * adam + weight_decay * weight_decay_scale * param)`."""

    Config = AdamWConfig

    def __init__(self, cfg: AdamWConfig, *, treatments: dict[str, Any]):
        self._weight_decay, self._treatments = cfg.weight_decay, treatments
        self._adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)

    def init(self, params: Params) -> State:
        return self._adam.init(params)

    def update(
        self, grads: Params, state: State, params: Params, rate: float, schedule: Float[Array, ""]
    ) -> tuple[Params, State]:
        # Optax raises a float to the power of an integer count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            directions, state = self._adam.update(grads, state)

        def update(direction: Array, param: Array, t: Treatment) -> Array:
            decay = self._weight_decay * t.weight_decay_scale
            return -schedule * rate * (t.lr_scale * direction + decay * param)

        return jax.tree.map(update, directions, params, self._treatments), state


class AfmOptimizer:
    """An update is `-schedule * (rate * lr_scale * momentum + weight_decay * weight_decay_scale * param)`."""

    Config = AfmOptimizerConfig

    def __init__(self, cfg: AfmOptimizerConfig, *, treatments: dict[str, Any]):
        self._weight_decay, self._treatments = cfg.weight_decay, treatments
        self._momentum = scale_by_bounded_rms(
            momentum_decay=cfg.momentum_decay,
            square_decay=cfg.square_decay,
            square_eps=cfg.square_eps,
            max_update_rms=cfg.max_update_rms,
            stacked=jax.tree.map(lambda t: t.stacked, treatments),
        )

    def init(self, params: Params) -> State:
        return self._momentum.init(params)

    def update(
        self, grads: Params, state: State, params: Params, rate: float, schedule: Float[Array, ""]
    ) -> tuple[Params, State]:
        momenta, state = self._momentum.update(grads, state)

        def update(momentum: Array, param: Array, t: Treatment) -> Array:
            decay = self._weight_decay * t.weight_decay_scale
            return -schedule * (rate * t.lr_scale * momentum + decay * param)

        return jax.tree.map(update, momenta, params, self._treatments), state


class BoundedRmsState(NamedTuple):
    """The state of `scale_by_bounded_rms`."""

    step: Int[Array, ""]
    momentum: Params
    square: Params  # the moving average of the squared gradient, not corrected for its bias


def scale_by_bounded_rms(
    *,
    momentum_decay: float,
    square_decay: float,
    square_eps: float,
    max_update_rms: float,
    stacked: dict[str, Any],
) -> optax.GradientTransformation:
    """The direction of the AFM optimizer: the momentum of gradients over their RMS in time, bounded in space.

    Args:
        momentum_decay: of the moving average of the bounded updates, which is not corrected for its bias.
        square_decay: of the moving average of the squared gradients, which is.
        square_eps: added to each squared gradient.
        max_update_rms: the largest RMS of a block's update, before the momentum.
        stacked: of each parameter, how many leading dims count its blocks.
    """

    def init(params: Any) -> BoundedRmsState:
        return BoundedRmsState(
            step=jnp.zeros([], jnp.int32),
            momentum=jax.tree.map(jnp.zeros_like, params),
            square=jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, BoundedRmsState]:
        del params
        step = state.step + 1
        square = jax.tree.map(
            lambda v, g: square_decay * v + (1 - square_decay) * (g * g + square_eps), state.square, updates
        )
        seen = 1 - square_decay ** step.astype(jnp.float32)

        def bounded(grad: Array, v: Array, stacked: int) -> Array:
            scaled = grad / jnp.sqrt(v / seen)
            dims = tuple(range(stacked, scaled.ndim))
            rms = jnp.sqrt(jnp.mean(scaled * scaled, axis=dims, keepdims=True))
            return scaled / jnp.maximum(1.0, rms / max_update_rms)

        updates = jax.tree.map(bounded, updates, square, stacked)
        momentum = jax.tree.map(
            lambda m, u: momentum_decay * m + (1 - momentum_decay) * u, state.momentum, updates
        )
        return momentum, BoundedRmsState(step=step, momentum=momentum, square=square)

    return optax.GradientTransformation(init, update)
