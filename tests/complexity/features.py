"""The features that the report integrates, and how it knows that a built model has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pippin.core.config import Config
from pippin.core.config_tree import Modifier, flatten, traverse
from pippin.core.module import flatten_params, parameter_infos
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.moe_config import MoEConfig
from pippin.layers.position_config import NoPEConfig, RoPEConfig
from pippin.layers.stack import TransformerLayer
from tests.complexity import modifiers
from tests.complexity.runs import Batch, Run, run
from tests.complexity.user_features import LogDistance, SharedExpertMoE


class FeatureError(Exception):
    """A model does not have the feature that was integrated into it."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """A component that takes the place of another, by a modifier."""

    name: str
    modifier: Modifier[CausalLMConfig]
    replaces: type[Config]
    adds: type[Config]
    acts: Callable[[Feature, CausalLMConfig, CausalLMConfig], None]  # raises FeatureError where it does not
    from_user: bool  # the packages do not know it


def integrate(feature: Feature, old: CausalLMConfig) -> tuple[CausalLMConfig, int]:
    """The config with the feature, and how many components were replaced.

    Raises:
        FeatureError: a component was left out, or something else changed as well.
    """
    new = feature.modifier(old)
    at = [path for path, cfg in traverse(old) if isinstance(cfg, feature.replaces)]
    there = dict(traverse(new))
    left = [path for path in at if not isinstance(there[path], feature.adds)]
    if left:
        raise FeatureError(f"{feature.name} was not integrated at {', '.join(left)}")
    before, after = _outside(at, old), _outside(at, new)
    if before != after:
        changed = sorted({path for path, _ in before.items() ^ after.items()})
        raise FeatureError(f"{feature.name} changed {', '.join(changed)} as well")
    return new, len(at)


def _outside(paths: list[str], cfg: Config) -> dict[str, Any]:
    """Every value of a tree that does not lie at or below one of the paths."""
    inside = tuple(f"{path}." for path in paths)
    return {path: value for path, value in flatten(cfg).items() if not f"{path}.".startswith(inside)}


def position_acts(feature: Feature, old: CausalLMConfig, new: CausalLMConfig) -> None:
    """Runs both on the same parameters, tokens and positions.

    The feature must change the logits; distances twice as long must change them
    again, which they cannot do to the old model unless it has a window; and a shift
    of all positions must not, as all the position encodings here are relative.

    Raises:
        FeatureError: one of these does not hold.
    """
    batch = Batch.random()
    far, shifted = batch.at(batch.positions * 2), batch.at(batch.positions + 5)
    plain = run(old, batch)
    featured = run(new, batch, plain.params)
    effect = _distance(plain, featured)
    _require(effect > 1e-3, feature, f"changes the logits by {effect:.2g} only")
    stretch = _distance(featured, run(new, far, plain.params))
    _require(
        stretch > 1e-3, feature, f"does not see distances: twice as long, the logits change by {stretch:.2g}"
    )
    # bfloat16 rounds the rotated queries, so the shift is held against the effect rather than against zero.
    shift = _distance(featured, run(new, shifted, plain.params))
    _require(shift < 0.1 * effect, feature, f"is not relative: shifted, the logits change by {shift:.2g}")
    if not any(getattr(cfg, "window", None) for _, cfg in traverse(old)):
        control = _distance(plain, run(old, far, plain.params))
        _require(control < 1e-6, feature, f"is not what sees distances: without it, {control:.2g}")


def experts_act(feature: Feature, old: CausalLMConfig, new: CausalLMConfig) -> None:
    """Runs the new model forward and backward.

    Every layer must have experts, their router must report a loss that is in the
    total, and a gradient must reach the experts of each layer.

    Raises:
        FeatureError: one of these does not hold.
    """
    featured = run(new, Batch.random(), with_gradients=True)
    metrics = featured.metrics
    router = {k: float(v) for k, v in metrics.items() if k in ("moe/balance_loss", "moe/router_z_loss")}
    _require(len(router) == 2 and min(router.values()) > 0, feature, f"reports the router losses {router}")
    parts = float(metrics["cross_entropy"] + metrics["z_loss"]) + sum(router.values())
    off = abs(float(featured.loss) - parts)
    _require(off < 1e-4, feature, f"has a loss that its parts miss by {off:.2g}")
    layers = [m for _, m in nnx.iter_graph(featured.model) if isinstance(m, TransformerLayer)]
    lacking = [m for m in layers if not isinstance(m.feed_forward, feature.adds.implementation())]
    _require(bool(layers) and not lacking, feature, f"is missing in {len(lacking)} of {len(layers)} layers")
    infos = flatten_params(parameter_infos(featured.model))
    experts = {path: info for path, info in infos.items() if "experts" in info.axes}
    _require(
        len(experts) == 3 * len(layers), feature, f"has {len(experts)} expert weights in {len(layers)} layers"
    )
    gradients = flatten_params(featured.gradients or {})
    for path, info in experts.items():
        # One slice for each layer of a stack: each must learn.
        slices = jnp.max(jnp.abs(gradients[path]), axis=tuple(range(info.stacked, len(info.shape))))
        _require(bool(jnp.all(slices > 0)), feature, f"has no gradient at {path}")


def new_axes(feature: Feature, old: CausalLMConfig) -> set[str]:
    """The logical axes that the parameters have with the feature and have not without it."""

    def axes(cfg: CausalLMConfig) -> set[str]:
        infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))))
        return {axis for info in infos.values() for axis in info.axes if axis is not None}

    return axes(feature.modifier(old)) - axes(old)


def _distance(a: Run, b: Run) -> float:
    """How far logits are from each other, in standard deviations of the first."""
    assert a.logits is not None and b.logits is not None
    x, y = a.logits.astype(jnp.float32), b.logits.astype(jnp.float32)
    return float(jnp.max(jnp.abs(x - y)) / jnp.std(x))


def _require(holds: bool, feature: Feature, problem: str) -> None:
    if not holds:
        raise FeatureError(f"{feature.name} {problem}")


FEATURES = (
    Feature("RoPE", modifiers.with_rope, NoPEConfig, RoPEConfig, position_acts, False),
    Feature("MoE", modifiers.with_moe, FeedForwardConfig, MoEConfig, experts_act, False),
    Feature("LogDistance", modifiers.with_log_distance, NoPEConfig, LogDistance.Config, position_acts, True),
    Feature(
        "SharedExpertMoE",
        modifiers.with_shared_expert,
        FeedForwardConfig,
        SharedExpertMoE.Config,
        experts_act,
        True,
    ),
)
