"""Each optimizer over several steps against its formula in numpy and float64, and AdamW against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pippin.core.module import flatten_params, unflatten_params
from pippin.train.learner import toy
from pippin.train.learner.config import (
    AdamWConfig,
    AfmOptimizerConfig,
    ConstantScheduleConfig,
    LearnerConfig,
    LinearScheduleConfig,
    MuPConfig,
    RuleConfig,
)

STEPS = 8
RATE, WARMUP, TOTAL, FINAL = 0.02, 3, 10, 0.1
# Float32 rounds at 6e-8. A step rounds the moments, their root and quotient, and the bias correction, whose
# 1 - 0.95 in float32 is 2.4e-7 off; parameters up to 4 add their own 2e-7 a step. So some 1e-6 in eight steps.
TOLERANCE = 2e-6

_BIG = 30.0  # gradients of a norm above the clip
_RULES = (
    RuleConfig(component="norm", weight_decay_scale=0.0),
    RuleConfig(component="embedding", lr_scale=0.5),
)


def _lr_scale(path: str) -> float:
    """What _RULES and muP with base_dim 2 of the toy's 4 make of a parameter."""
    return {"embedding.weight": 0.5, "layers.attention.q.weight": 0.5, "layers.mlp.up.weight": 0.5}.get(
        path, 1.0
    )


def _decay_scale(path: str) -> float:
    return 0.0 if path.endswith("norm.scale") else 1.0


def _schedule(t: int) -> float:
    left = 1 - min(max((t - WARMUP) / (TOTAL - WARMUP), 0), 1)
    return min(t / WARMUP, 1) * (FINAL + (1 - FINAL) * left)


def _learner(optimizer, **fields):
    cfg = LearnerConfig(
        learning_rate=RATE,
        optimizer=optimizer,
        schedule=LinearScheduleConfig(warmup_steps=WARMUP, final_ratio=FINAL),
        rules=_RULES,
        mup=MuPConfig(base_dim=2),
        **fields,
    )
    return cfg.build(infos=toy.infos(), total_steps=TOTAL)


def _run(learner):
    params = jax.tree.map(jnp.asarray, toy.params())
    state = learner.init(params)
    update = jax.jit(learner.update)
    for t in range(1, STEPS + 1):
        params, state, _ = update(params, toy.params(seed=t, scale=_scale(t)), state)
    return flatten_params(params)


def _scale(t: int) -> float:
    return (
        _BIG / t if t % 2 else 0.01
    )  # above the clip and below it, in turn; never so large that it is skipped


def _clipped(t: int) -> dict[str, np.ndarray]:
    grads = {p: g.astype(np.float64) for p, g in flatten_params(toy.params(seed=t, scale=_scale(t))).items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {p: g * min(1.0, 1.0 / norm) for p, g in grads.items()}


def _compare(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=path)


def test_adamw_follows_its_formula():
    b1, b2, eps, decay = 0.9, 0.95, 1e-8, 0.3
    params = {p: x.astype(np.float64) for p, x in flatten_params(toy.params()).items()}
    m = {p: np.zeros_like(x) for p, x in params.items()}
    v = {p: np.zeros_like(x) for p, x in params.items()}
    for t in range(1, STEPS + 1):
        rate = RATE * _schedule(t)
        for p, g in _clipped(t).items():
            m[p] = b1 * m[p] + (1 - b1) * g
            v[p] = b2 * v[p] + (1 - b2) * g**2
            adam = m[p] / (1 - b1**t) / (np.sqrt(v[p] / (1 - b2**t)) + eps)
            params[p] = params[p] - rate * (_lr_scale(p) * adam + decay * _decay_scale(p) * params[p])
    optimizer = AdamWConfig(beta1=b1, beta2=b2, eps=eps, weight_decay=decay)
    _compare(_run(_learner(optimizer, skip_norm=None)), params)


def test_afm_follows_its_formula():
    b, eps, decay = 0.95, 1e-30, 0.02
    params = {p: x.astype(np.float64) for p, x in flatten_params(toy.params()).items()}
    m = {p: np.zeros_like(x) for p, x in params.items()}
    v = {p: np.zeros_like(x) for p, x in params.items()}
    bounded = 0
    for t in range(1, STEPS + 1):
        s = _schedule(t)
        for p, g in _clipped(t).items():
            v[p] = b * v[p] + (1 - b) * (g**2 + eps)
            u = g / np.sqrt(v[p] / (1 - b**t))
            for block in u if p.startswith("layers.") else [u]:  # a view: one layer of a stack, or all
                rms = np.sqrt((block**2).mean())
                bounded += rms > 1
                block /= max(1.0, rms)
            m[p] = b * m[p] + (1 - b) * u
            params[p] = params[p] - s * (RATE * _lr_scale(p) * m[p] + decay * _decay_scale(p) * params[p])
    assert 20 < bounded < 12 * STEPS  # blocks of both kinds were seen
    _compare(_run(_learner(AfmOptimizerConfig(weight_decay=decay), skip_norm=None)), params)


def test_adamw_equals_that_of_optax():
    """Bit for bit but for the order of the products: the same moments from the same library."""
    cfg = LearnerConfig(
        learning_rate=RATE,
        optimizer=AdamWConfig(weight_decay=0.1),
        schedule=ConstantScheduleConfig(),
        clip_norm=None,
    )
    learner = cfg.build(infos=toy.infos())
    peer = optax.adamw(RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    params = expected = jax.tree.map(jnp.asarray, toy.params())
    state, peer_state = learner.init(params), peer.init(expected)
    update = jax.jit(learner.update)
    for t in range(1, STEPS + 1):
        grads = jax.tree.map(jnp.asarray, toy.params(seed=t))
        params, state, _ = update(params, grads, state)
        with jax.numpy_dtype_promotion("standard"):
            updates, peer_state = peer.update(grads, peer_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=3e-7, atol=3e-7), params, expected)


@pytest.mark.parametrize("optimizer", [AdamWConfig(weight_decay=0.0), AfmOptimizerConfig(weight_decay=0.0)])
def test_a_gradient_of_zero_changes_nothing(optimizer):
    learner = _learner(optimizer)
    params = jax.tree.map(jnp.asarray, toy.params())
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _, metrics = jax.jit(learner.update)(params, zeros, learner.init(params))
    jax.tree.map(np.testing.assert_array_equal, new, params)
    assert float(metrics["skipped"]) == 0


def test_the_layers_of_a_stack_are_bounded_each_alone():
    """A layer whose gradient jumps is held back; its neighbours in the array move as if alone."""
    path = "layers.attention.q.weight"
    learner = LearnerConfig(
        learning_rate=1.0,
        optimizer=AfmOptimizerConfig(weight_decay=0.0),
        schedule=ConstantScheduleConfig(),
        clip_norm=None,
        skip_norm=None,
    ).build(infos=toy.infos())

    update = jax.jit(learner.update)

    def moved(jump: float) -> np.ndarray:
        params = jax.tree.map(jnp.zeros_like, toy.params())
        state = learner.init(params)
        for factor in (1.0, jump):
            before = flatten_params(params)[path]
            grads = flatten_params(jax.tree.map(jnp.ones_like, params))
            grads[path] = grads[path].at[1].multiply(factor)
            params, state, _ = update(params, unflatten_params(grads), state)
        return np.asarray(flatten_params(params)[path] - before)

    calm, wild = moved(1.0), moved(100.0)
    np.testing.assert_array_equal(wild[[0, 2]], calm[[0, 2]])
    # Momentum 0.05 of the first step decays by 0.95; the bound adds 0.05 times at most 1, not times 1.4.
    np.testing.assert_allclose(wild[1], -(0.95 * 0.05 + 0.05), rtol=1e-6)
