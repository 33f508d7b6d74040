"""Tests of the schedules against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.train.learner.config import ConstantScheduleConfig, CosineScheduleConfig, LinearScheduleConfig

# One float32 cosine and two roundings of numbers up to 1: some units of 6e-8.
TOLERANCE = 5e-7


def _values(schedule, steps):
    return np.asarray(jax.vmap(schedule)(jnp.asarray(steps, jnp.int32)))


def test_the_warm_up_is_linear_and_reaches_the_peak_at_its_last_step():
    for cfg in (ConstantScheduleConfig, CosineScheduleConfig, LinearScheduleConfig):
        values = _values(cfg(warmup_steps=4).build(total_steps=20), [1, 2, 3, 4])
        np.testing.assert_allclose(values, [0.25, 0.5, 0.75, 1.0], atol=TOLERANCE)


def test_a_constant_schedule_stays_at_the_peak():
    np.testing.assert_array_equal(_values(ConstantScheduleConfig().build(), [1, 2, 10**9]), 1.0)


def test_cosine_follows_its_formula_and_stays_at_the_final_ratio():
    warmup, total, final = 10, 110, 0.005
    schedule = CosineScheduleConfig(warmup_steps=warmup, final_ratio=final).build(total_steps=total)
    steps = np.arange(warmup, total + 1)
    angles = math.pi * (steps - warmup) / (total - warmup)
    np.testing.assert_allclose(
        _values(schedule, steps), final + (1 - final) * 0.5 * (1 + np.cos(angles)), atol=TOLERANCE
    )
    np.testing.assert_allclose(_values(schedule, [total, 5 * total]), final, atol=TOLERANCE)


def test_linear_follows_its_formula_and_stays_at_the_final_ratio():
    schedule = LinearScheduleConfig(final_ratio=0.1).build(total_steps=10)
    np.testing.assert_allclose(_values(schedule, [5, 10, 99]), [0.55, 0.1, 0.1], atol=TOLERANCE)


def test_end_step_outweighs_the_length_of_the_run():
    schedule = LinearScheduleConfig(end_step=4).build(total_steps=100)
    np.testing.assert_allclose(_values(schedule, [2, 4, 5]), [0.5, 0.0, 0.0], atol=TOLERANCE)


def test_a_run_may_end_inside_its_warm_up():
    values = _values(CosineScheduleConfig(warmup_steps=100).build(total_steps=3), [1, 2, 3])
    np.testing.assert_allclose(values, [0.01, 0.02, 0.03], atol=TOLERANCE)


def test_a_decay_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="was not told which that is. Set end_step"):
        CosineScheduleConfig().build()
