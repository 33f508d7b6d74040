"""What goes through a model's linear maps on some text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pippin.core.batch import Batch
from pippin.core.config import Config
from pippin.core.config_tree import inherit, transform
from pippin.core.errors import QuantizationError
from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.export.compress.config import ObservedGroupedLinearConfig, ObservedLinearConfig
from pippin.export.compress.observed_linear import INPUTS, LOSS_INPUTS, LOSS_OUTPUTS
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.linear_config import GroupedLinearConfig, LinearConfig, QuantizedLinearConfig
from pippin.layers.unrolled import unrolled

_OBSERVED = {
    LinearConfig: ObservedLinearConfig(),
    QuantizedLinearConfig: ObservedLinearConfig(),
    GroupedLinearConfig: ObservedGroupedLinearConfig(),
}


@dataclasses.dataclass(frozen=True)
class LinearStatistics:
    """Means over tokens. Both have the leading dims of the weight, such as one for experts."""

    inputs: np.ndarray  # [..., I], of each input's square
    loss_inputs: np.ndarray  # [..., I], of that times the sum of the squares of all outputs' gradients
    loss_outputs: (
        np.ndarray
    )  # [..., O], of the square of each output's gradient times the sum of all inputs' squares


def observed(cfg: CausalLMConfig) -> CausalLMConfig:
    """The model with linear maps that measure what goes through them, in float32."""

    def change(part: Config) -> Config:
        new = _OBSERVED.get(type(part))
        return part if new is None else inherit(new, part)

    return transform(cfg, change).set(activation_dtype=FloatType.FLOAT32)


def calibrate(
    cfg: CausalLMConfig,
    params: Mapping[str, Any],
    batches: Sequence[Batch],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, LinearStatistics]:
    """What goes through each linear map, by the path that its weight has in the model without stacks.

    Args:
        cfg: the model's config, as it is stored: its layers in loops compile fast.
        params: its parameters.
        batches: all of one shape.
        progress: called after each batch.

    Raises:
        QuantizationError: a sum is not finite.
    """
    observing = observed(cfg)
    definition, abstract = nnx.eval_shape(lambda: _parts(observing))
    flat = flatten_params(params)
    shapes = flatten_params(abstract)
    sums = {p: jnp.zeros(s.shape, jnp.float32) for p, s in shapes.items() if p not in flat}
    weights = {p: jnp.asarray(flat[p], jnp.float32) for p in shapes if p in flat}

    @jax.jit
    def add(sums: dict[str, Any], weights: dict[str, Any], batch: Batch) -> dict[str, Any]:
        def loss(observers: dict[str, Any]) -> Any:
            model = merge(definition, unflatten_params({**weights, **observers}))
            mean, metrics = model.loss(batch)
            return (
                mean * metrics["weight"]
            )  # the sum: of one token's loss, gradients do not depend on the others

        return jax.tree.map(jnp.add, sums, jax.grad(loss)(jax.tree.map(jnp.zeros_like, sums)))

    tokens = 0
    for batch in batches:
        sums = add(sums, weights, batch)
        jax.block_until_ready(sums)
        tokens += batch["tokens"].size
        progress()
    means = {path: np.asarray(total) / tokens for path, total in sums.items()}
    _require_finite(means)
    _, tree = unrolled(observing, unflatten_params({**{p: flat[p] for p in weights}, **means}))
    return _by_map(flatten_params(tree))


def _parts(cfg: CausalLMConfig) -> Any:
    return split(cfg.build(rngs=nnx.Rngs(0)))


def _by_map(flat: Mapping[str, Any]) -> dict[str, LinearStatistics]:
    ends = f".{INPUTS}"
    paths = [path.removesuffix(ends) for path in flat if path.endswith(ends)]
    names = (INPUTS, LOSS_INPUTS, LOSS_OUTPUTS)
    return {path: LinearStatistics(*(flat[f"{path}.{name}"] for name in names)) for path in paths}


def _require_finite(means: Mapping[str, np.ndarray]) -> None:
    for path, values in means.items():
        if not np.isfinite(values).all():
            raise QuantizationError(
                f"{path.rpartition('.')[0]}: what goes through it on the calibration text is not finite. Train the model "
                "again from a step before that, or give another text."
            )
