"""Schedules: the ratio of an update's learning rate to the peak, from 0 to 1. Updates count from 1.

So the first update of a warm-up of W steps has the ratio 1/W, and update W is the first at the peak.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pippin.core.errors import ConfigError
from pippin.train.learner.config import ConstantScheduleConfig, CosineScheduleConfig, LinearScheduleConfig


class ConstantSchedule:
    """The ratio rises linearly to 1 and stays there."""

    Config = ConstantScheduleConfig

    def __init__(self, cfg: ConstantScheduleConfig, *, total_steps: int | None = None):
        del total_steps  # it ends nowhere
        self._warmup = cfg.warmup_steps

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return _warm_up(step, self._warmup)


class CosineSchedule:
    """The ratio rises linearly to 1, then falls to the final ratio along half a cosine.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """

    Config = CosineScheduleConfig

    def __init__(self, cfg: CosineScheduleConfig, *, total_steps: int | None = None):
        self._cfg, self._end = cfg, _end_step(cfg, total_steps)

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        left = 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, self._cfg.warmup_steps, self._end)))
        final = self._cfg.final_ratio
        return _warm_up(step, self._cfg.warmup_steps) * (final + (1 - final) * left)


class LinearSchedule:
    """The ratio rises linearly to 1, then falls linearly to the final ratio."""

    Config = LinearScheduleConfig

    def __init__(self, cfg: LinearScheduleConfig, *, total_steps: int | None = None):
        self._cfg, self._end = cfg, _end_step(cfg, total_steps)

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        left = 1 - _progress(step, self._cfg.warmup_steps, self._end)
        final = self._cfg.final_ratio
        return _warm_up(step, self._cfg.warmup_steps) * (final + (1 - final) * left)


def _end_step(cfg: CosineScheduleConfig | LinearScheduleConfig, total_steps: int | None) -> int:
    end = cfg.end_step if cfg.end_step is not None else total_steps
    if end is None:
        raise ConfigError(
            f"{type(cfg).__name__} decays until the run's last step, and was not told which that is. "
            "Set end_step, or build the learner with total_steps."
        )
    return end


def _warm_up(step: Int[Array, ""], warmup_steps: int) -> Float[Array, ""]:
    """1 after the warm-up."""
    return jnp.minimum(step.astype(jnp.float32) / max(warmup_steps, 1), 1.0)


def _progress(step: Int[Array, ""], warmup_steps: int, end: int) -> Float[Array, ""]:
    """0 until the warm-up is over, 1 from the end on. A run may end inside its warm-up."""
    return jnp.clip((step - warmup_steps).astype(jnp.float32) / max(end - warmup_steps, 1), 0.0, 1.0)
