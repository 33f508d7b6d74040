"""The learner: parameters and gradients to the next parameters, as one pure function."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from pippin.core.errors import PippinError
from pippin.core.module import Params, flatten_params, unflatten_params
from pippin.train.learner.config import LearnerConfig
from pippin.train.learner.rules import resolve


class DivergenceError(PippinError):
    """Training whose gradients stayed too large or not finite."""


class LearnerState(NamedTuple):
    """Arrays only. Trees in it hold the trainable parameters' names, and no others."""

    step: Int[Array, ""]  # how many updates were made; skipped steps do not count
    consecutive_skips: Int[Array, ""]  # since the last update
    optimizer: Any
    ema: Params  # empty where the learner averages no parameters


class Learner:
    """Makes a step's parameters from the last ones and their gradients.

    A step whose gradient norm is at least `skip_norm`, or not finite, changes
    nothing but the count of consecutive skips: parameters, optimizer state,
    schedule and averages stay as they are, bit for bit. Frozen parameters have
    no state, and their gradients, if there are any, count nowhere.
    """

    Config = LearnerConfig

    def __init__(self, cfg: LearnerConfig, *, infos: Mapping[str, Any], total_steps: int | None = None):
        """Resolves the rules.

        Args:
            cfg: see its fields.
            infos: `parameter_infos` of the model.
            total_steps: how many updates the run makes, for a schedule that ends with it.

        Raises:
            ConfigError: a rule does not fit the parameters, or the schedule has no end.
        """
        self._cfg = cfg
        treatments = {path: t for path, t in resolve(cfg, infos).items() if not t.frozen}
        self._infos = {path: info for path, info in flatten_params(infos).items() if path in treatments}
        self._schedule = cfg.schedule.build(total_steps=total_steps)
        self._optimizer = cfg.optimizer.build(treatments=unflatten_params(treatments))

    def trainable(self, params: Params) -> Params:
        """The part of a tree of parameters that is not frozen: what to differentiate by."""
        flat = flatten_params(params)
        return unflatten_params({path: flat[path] for path in self._infos})

    def init(self, params: Params) -> LearnerState:
        """The state before the first update. It shares no buffer with `params`: both may be donated."""
        trainable = _float32(self.trainable(params))
        return LearnerState(
            step=jnp.zeros([], jnp.int32),
            consecutive_skips=jnp.zeros([], jnp.int32),
            optimizer=self._optimizer.init(trainable),
            ema={} if self._cfg.ema_decay is None else jax.tree.map(jnp.copy, trainable),
        )

    def update(
        self, params: Params, grads: Params, state: LearnerState
    ) -> tuple[Params, LearnerState, dict[str, Float[Array, ""]]]:
        """The next parameters and state, and the metrics of this step.

        Computed in float32, whatever the parameters' dtype. `grads` are those
        of `params` or of `trainable(params)`. Metrics: `learning_rate` (the
        peak times the schedule), `grad_norm` (before the clip), `update_norm`
        and `param_norm` (of the trainable parameters, after the step),
        `skipped` (0 or 1) and `consecutive_skips`.
        """
        cfg = self._cfg
        old = _float32(self.trainable(params))
        grads = _float32(self.trainable(grads))
        norm = optax.tree.norm(grads)
        skip = ~(norm < (math.inf if cfg.skip_norm is None else cfg.skip_norm))  # a NaN is not below it
        if cfg.clip_norm is not None:
            clip = jnp.minimum(1.0, cfg.clip_norm / norm)
            grads = jax.tree.map(lambda g: g * clip, grads)
        ratio = self._schedule(state.step + 1)
        updates, optimizer = self._optimizer.update(grads, state.optimizer, old, cfg.learning_rate, ratio)
        new = _select(skip, old, jax.tree.map(jnp.add, old, updates))
        skips = jnp.where(skip, state.consecutive_skips + 1, 0)
        made = LearnerState(
            step=jnp.where(skip, state.step, state.step + 1),
            consecutive_skips=skips,
            optimizer=_select(skip, state.optimizer, optimizer),
            ema=_select(skip, state.ema, self._average(state.ema, new)),
        )
        metrics = {
            "learning_rate": cfg.learning_rate * ratio,
            "grad_norm": norm,
            "update_norm": jnp.where(skip, 0.0, optax.tree.norm(updates)),
            "param_norm": optax.tree.norm(new),
            "skipped": skip.astype(jnp.float32),
            "consecutive_skips": skips.astype(jnp.float32),
        }
        return self.join(params, new), made, metrics

    def ema(self, state: LearnerState, params: Params) -> Params | None:
        """The averaged parameters, frozen ones taken from `params`; None where the learner averages none."""
        return self.join(params, state.ema) if state.ema else None

    def map_state(
        self,
        state: Any,
        parameter: Callable[[Any, Any], Any],
        other: Callable[[Any], Any],
    ) -> Any:
        """A tree of the state's structure, for shardings and the like.

        Args:
            state: a `LearnerState`, or `jax.eval_shape(learner.init, params)`.
            parameter: called with each leaf that has a parameter's shape, and that parameter's `ParameterInfo`.
            other: called with each other leaf: counts.
        """
        infos = unflatten_params(self._infos)

        def pair(node: Any) -> Any:
            if not isinstance(node, dict):
                return other(node)
            return jax.tree.map(parameter, node, infos) if node else {}

        # States are made of tuples and counts; each dict in them has the trainable parameters' structure.
        return jax.tree.map(pair, state, is_leaf=lambda node: isinstance(node, dict))

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raises `DivergenceError` where more steps in a row were skipped than the config allows."""
        skips = int(metrics["consecutive_skips"])
        if skips > self._cfg.max_consecutive_skips:
            raise DivergenceError(
                f"the last {skips} steps were skipped: their gradient norms (the last is "
                f"{float(metrics['grad_norm']):g}) were not finite, or not below skip_norm "
                f"({self._cfg.skip_norm}). More than max_consecutive_skips ({self._cfg.max_consecutive_skips}) in a "
                "row end the run. Lower learning_rate, or lengthen the schedule's warmup_steps."
            )

    def _average(self, ema: Params, new: Params) -> Params:
        decay = self._cfg.ema_decay
        return {} if decay is None else jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, new)

    def join(self, params: Params, trainable: Params) -> Params:
        """`params` with the trainable ones replaced, in the dtypes of `params`."""
        flat, changed = flatten_params(params), flatten_params(trainable)
        return unflatten_params(
            {p: changed[p].astype(v.dtype) if p in changed else v for p, v in flat.items()}
        )


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _select(skip: Bool[Array, ""], old: Any, new: Any) -> Any:
    return jax.tree.map(lambda o, n: jnp.where(skip, o, n), old, new)
