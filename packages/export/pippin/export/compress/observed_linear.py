"""Linear maps that measure what goes through them, as the gradients of parameters that change nothing.

So that a model with any loops, branches or recomputation is measured by `jax.grad`, which knows what to do with them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.module import constant_init, parameter
from pippin.export.compress.config import ObservedGroupedLinearConfig, ObservedLinearConfig
from pippin.layers.linear import GroupedLinear, Linear

# The parameters, and what their gradients are: sums over tokens t of squares of inputs x and output gradients g.
INPUTS = "squared_inputs"  # x_ti^2
LOSS_INPUTS = "loss_inputs"  # x_ti^2 * sum_j g_tj^2
LOSS_OUTPUTS = "loss_outputs"  # g_tj^2 * sum_i x_ti^2


class ObservedLinear(Linear):
    """Computes what `Linear` does, and measures what goes through."""

    Config = ObservedLinearConfig

    def __init__(self, cfg: ObservedLinearConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        zeros, inputs, outputs = constant_init(0.0), (cfg.input_dim,), (cfg.output_dim,)
        self.squared_inputs = parameter(zeros, rngs, inputs, (cfg.input_axis,), fan_in=1)
        self.loss_inputs = parameter(zeros, rngs, inputs, (cfg.input_axis,), fan_in=1)
        self.loss_outputs = parameter(zeros, rngs, outputs, (cfg.output_axis,), fan_in=1)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = super().__call__(x)
        return _observed(x, y, self.squared_inputs[...], self.loss_inputs[...], self.loss_outputs[...])


class ObservedGroupedLinear(GroupedLinear):
    """Computes what `GroupedLinear` does, and measures what goes through each group."""

    Config = ObservedGroupedLinearConfig

    def __init__(self, cfg: ObservedGroupedLinearConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        zeros, groups = constant_init(0.0), cfg.num_groups
        inputs, outputs = ("experts", cfg.input_axis), ("experts", cfg.output_axis)
        self.squared_inputs = parameter(zeros, rngs, (groups, cfg.input_dim), inputs, fan_in=1)
        self.loss_inputs = parameter(zeros, rngs, (groups, cfg.input_dim), inputs, fan_in=1)
        self.loss_outputs = parameter(zeros, rngs, (groups, cfg.output_dim), outputs, fan_in=1)

    def __call__(self, x: Float[Array, "M I"], group_sizes: Int[Array, " G"]) -> Float[Array, "M O"]:
        y = super().__call__(x, group_sizes)
        observers = self.squared_inputs[...], self.loss_inputs[...], self.loss_outputs[...]
        return _observed_groups(x, y, group_sizes, *observers)


@jax.custom_vjp
def _observed(
    x: Float[Array, "*B I"],
    y: Float[Array, "*B O"],
    squared_inputs: Float[Array, " I"],
    loss_inputs: Float[Array, " I"],
    loss_outputs: Float[Array, " O"],
) -> Float[Array, "*B O"]:
    return y


def _forward(x: Array, y: Array, *observers: Array) -> tuple[Array, Array]:
    return y, x


def _backward(x: Array, gradient: Array) -> tuple[Array, ...]:
    rows = tuple(s.reshape(-1, s.shape[-1]) for s in _squares(x, gradient))
    return jnp.zeros_like(x), gradient, *(jnp.sum(r, axis=0) for r in rows)


_observed.defvjp(_forward, _backward)


@jax.custom_vjp
def _observed_groups(
    x: Float[Array, "M I"],
    y: Float[Array, "M O"],
    sizes: Int[Array, " G"],
    squared_inputs: Float[Array, "G I"],
    loss_inputs: Float[Array, "G I"],
    loss_outputs: Float[Array, "G O"],
) -> Float[Array, "M O"]:
    return y


def _forward_groups(x: Array, y: Array, sizes: Array, *observers: Array) -> tuple[Array, tuple[Array, Array]]:
    return y, (x, sizes)


def _backward_groups(saved: tuple[Array, Array], gradient: Array) -> tuple[Array | None, ...]:
    x, sizes = saved
    # Rows behind the last group are in none: their number is one too large, and is dropped.
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    sums = (jax.ops.segment_sum(s, group, sizes.shape[0]) for s in _squares(x, gradient))
    return jnp.zeros_like(x), gradient, None, *sums


_observed_groups.defvjp(_forward_groups, _backward_groups)


def _squares(x: Float[Array, "*B I"], gradient: Float[Array, "*B O"]) -> tuple[Array, Array, Array]:
    """What each token adds to each sum."""
    of_x, of_gradient = (jnp.square(a.astype(jnp.float32)) for a in (x, gradient))
    both = jnp.sum(of_gradient, axis=-1, keepdims=True), jnp.sum(of_x, axis=-1, keepdims=True)
    return of_x, of_x * both[0], of_gradient * both[1]
