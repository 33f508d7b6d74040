"""Tests of the learner: skips, frozen parameters, averages, metrics, and what its state looks like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.module import flatten_params
from pippin.train.learner import toy
from pippin.train.learner.config import (
    AdamWConfig,
    AfmOptimizerConfig,
    ConstantScheduleConfig,
    LearnerConfig,
    RuleConfig,
)
from pippin.train.learner.learner import DivergenceError

OPTIMIZERS = [AdamWConfig(), AfmOptimizerConfig()]


def _learner(optimizer=OPTIMIZERS[0], **fields):
    cfg = LearnerConfig(learning_rate=0.01, optimizer=optimizer, schedule=ConstantScheduleConfig(), **fields)
    return cfg.build(infos=toy.infos())


def _params(seed: int = 0, scale: float = 1.0):
    return jax.tree.map(jnp.asarray, toy.params(seed, scale))


@functools.cache
def _update(learner):
    return jax.jit(learner.update)


def _step(learner, params, state, seed=1, scale=1.0):
    return _update(learner)(params, _params(seed, scale), state)


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 100.0])
def test_a_skipped_step_changes_no_bit_but_the_count_of_skips(optimizer, bad):
    learner = _learner(optimizer, ema_decay=0.9)
    params, state, _ = _step(learner, _params(), learner.init(_params()))
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(-0.0)  # whose sum with 0 has other bits
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["norm"]["scale"] = grads["norm"]["scale"].at[0].set(bad)
    kept, after, metrics = _update(learner)(params, grads, state)
    assert _bits(kept) == _bits(params)
    assert _bits(after._replace(consecutive_skips=state.consecutive_skips)) == _bits(state)
    assert int(after.consecutive_skips) == 1
    assert (float(metrics["skipped"]), float(metrics["update_norm"])) == (1.0, 0.0)


def test_a_norm_just_below_the_limit_is_clipped_and_used():
    learner = _learner()
    grads = jax.tree.map(jnp.zeros_like, _params())
    grads["norm"]["scale"] = grads["norm"]["scale"].at[0].set(99.9)
    _, state, metrics = _update(learner)(_params(), grads, learner.init(_params()))
    assert float(metrics["skipped"]) == 0
    np.testing.assert_allclose(metrics["grad_norm"], 99.9, rtol=1e-6)
    assert int(state.step) == 1


def test_without_a_limit_only_a_norm_that_is_not_finite_is_skipped():
    learner = _learner(skip_norm=None)
    state = learner.init(_params())
    assert float(_step(learner, _params(), state, scale=1e6)[2]["skipped"]) == 0
    assert float(_step(learner, _params(), state, scale=float("inf"))[2]["skipped"]) == 1


def test_skips_in_a_row_are_counted_and_end_the_run():
    learner = _learner(max_consecutive_skips=2)
    params = _params()
    state = learner.init(params)
    counts = []
    for scale in (1e6, 1.0, 1e6, 1e6, 1e6):
        params, state, metrics = _step(learner, params, state, scale=scale)
        counts.append(int(metrics["consecutive_skips"]))
        if counts[-1] < 3:
            learner.check(metrics)
    assert counts == [1, 0, 1, 2, 3]
    with pytest.raises(
        DivergenceError, match=r"last 3 steps were skipped.*skip_norm \(100.0\).*Lower learning_rate"
    ):
        learner.check(metrics)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_parameters_have_no_state_and_no_update(optimizer):
    rules = (RuleConfig(component="causal_lm", frozen=True), RuleConfig(component="attention"))
    learner = _learner(optimizer, rules=rules, ema_decay=0.5)
    params = _params()
    state = learner.init(params)
    trainable = flatten_params(learner.trainable(params))
    assert trainable.keys() == {"layers.attention.q.weight", "layers.attention.q_norm.scale"}
    shapes = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    assert sorted(shapes) == sorted(3 * [x.shape for x in trainable.values()])  # two moments and the average
    new, _, _ = _step(learner, params, state)
    for path, value in flatten_params(new).items():
        assert (_bits(value) != _bits(flatten_params(params)[path])) == (path in trainable)


def test_gradients_of_frozen_parameters_count_nowhere():
    rules = (RuleConfig(component="embedding", frozen=True),)
    learner = _learner(rules=rules)
    params, grads = _params(), _params(1)
    part = _update(learner)(params, learner.trainable(grads), learner.init(params))
    grads["embedding"]["weight"] = jnp.full_like(grads["embedding"]["weight"], jnp.nan)
    assert _bits(_update(learner)(params, grads, learner.init(params))) == _bits(part)


def test_averages_follow_their_formula():
    learner = _learner(ema_decay=0.9)
    params = _params()
    state = learner.init(params)
    expected = {p: np.asarray(x, np.float64) for p, x in flatten_params(params).items()}
    for seed in range(1, 5):
        params, state, _ = _step(learner, params, state, seed)
        for p, x in flatten_params(params).items():
            expected[p] = 0.9 * expected[p] + 0.1 * np.asarray(x, np.float64)
    averaged = learner.ema(state, params)
    assert jax.tree.structure(averaged) == jax.tree.structure(params)
    for p, x in flatten_params(averaged).items():
        np.testing.assert_allclose(x, expected[p], rtol=1e-6, atol=1e-6)  # four float32 sums


def test_without_a_decay_there_are_no_averages():
    learner = _learner()
    state = learner.init(_params())
    assert learner.ema(state, _params()) is None
    assert state.ema == {}


def test_averages_of_a_model_with_frozen_parameters_are_whole():
    learner = _learner(rules=(RuleConfig(component="embedding", frozen=True),), ema_decay=0.5)
    params, state, _ = _step(learner, _params(), learner.init(_params()))
    averaged = learner.ema(state, params)
    assert jax.tree.structure(averaged) == jax.tree.structure(params)
    assert _bits(averaged["embedding"]) == _bits(params["embedding"])
    assert _bits(averaged["norm"]) != _bits(params["norm"])


def test_metrics_describe_the_step():
    learner = _learner()
    params, grads = _params(), _params(1)
    new, _, metrics = _step(learner, params, learner.init(params))

    def norm(tree):
        return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))

    assert {name: (x.shape, x.dtype) for name, x in metrics.items()} == dict.fromkeys(
        metrics, ((), jnp.float32)
    )
    expected = {
        "learning_rate": 0.01,
        "grad_norm": norm(grads),
        "update_norm": norm(jax.tree.map(jnp.subtract, new, params)),
        "param_norm": norm(new),
        "skipped": 0.0,
        "consecutive_skips": 0.0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            metrics[name], value, rtol=1e-5, err_msg=name
        )  # a difference of parameters


@pytest.mark.parametrize("init", [lambda learner: learner.init, lambda learner: jax.jit(learner.init)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_and_state_can_be_donated(optimizer, init):
    learner = _learner(optimizer, ema_decay=0.9, rules=(RuleConfig(component="embedding", frozen=True),))
    expected, expected_state = _params(), learner.init(_params())
    params = _params()
    state = init(learner)(params)
    donating = jax.jit(learner.update, donate_argnums=(0, 2))
    for seed in (1, 2, 3):
        given = params
        params, state, _ = donating(params, _params(seed), state)
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
        expected, expected_state, _ = _step(learner, expected, expected_state, seed)
    assert _bits((params, state)) == _bits((expected, expected_state))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_parameters_keep_their_dtype_and_the_state_is_float32(optimizer):
    learner = _learner(optimizer, ema_decay=0.9)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params())
    new, state, _ = _update(learner)(params, params, learner.init(params))
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(learner.ema(state, params))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_map_state_pairs_each_leaf_with_its_parameter(optimizer, ema_decay):
    rules = (RuleConfig(component="embedding", frozen=True),)
    learner = _learner(optimizer, ema_decay=ema_decay, rules=rules)
    state = jax.eval_shape(learner.init, _params())

    def same_shape(leaf, info):
        assert leaf.shape == info.shape
        return info.path

    def count(leaf):
        assert leaf.shape == ()
        return "count"

    mapped = learner.map_state(state, same_shape, count)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    paths = [p for p in jax.tree.leaves(mapped) if p != "count"]
    trainable = flatten_params(learner.trainable(_params()))
    assert sorted(paths) == sorted((2 if ema_decay is None else 3) * list(trainable))
