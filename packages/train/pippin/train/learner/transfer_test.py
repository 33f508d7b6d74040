"""Simple muP carries the best learning rate from a narrow model to a wide one; without it, the best rate moves.

A toy language model of attention and a feed-forward predicts the third token
of a noisy table from two. It is trained at three widths over four learning
rates; the figures in the asserts' messages are its losses.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

from pippin.core.config import Config, Configurable
from pippin.core.module import Params, flatten_params, unflatten_params
from pippin.train.learner import toy
from pippin.train.learner.config import AfmOptimizerConfig, LearnerConfig, MuPConfig

VOCAB, NOISE, STEPS = 12, 0.3, 40
BASE_DIM = 64
RATES = tuple(2.0**n for n in (-11, -9, -7, -5))

_CONTEXTS = jnp.stack(jnp.meshgrid(jnp.arange(VOCAB), jnp.arange(VOCAB)), axis=-1).reshape(-1, 2)
_NEXT = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, VOCAB**2))
_EXPECTED = (1 - NOISE) * jax.nn.one_hot(_NEXT, VOCAB) + NOISE / VOCAB


class _Traced(Configurable):
    """A schedule whose peak is an argument of the jitted run, so that one compilation serves all rates."""

    class Config(Config, provides="schedule"):
        pass

    rate: Any = None

    def __init__(self, cfg: Config, *, total_steps: int | None = None):
        del cfg, total_steps

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return _Traced.rate * jnp.minimum(step.astype(jnp.float32) / 10, 1.0)


def _infos(dim: int) -> dict[str, Any]:
    attention, mlp = ("attention", "linear"), ("feed_forward", "linear")
    found = [
        toy.info("embedding", (2 * VOCAB, dim), ("vocab", "input"), "embedding"),
        *(toy.info(f"attention.{name}", (dim, dim), ("input", "heads"), *attention) for name in "qkvo"),
        toy.info("mlp.up", (dim, 2 * dim), ("input", "mlp"), *mlp),
        toy.info("mlp.down", (2 * dim, dim), ("mlp", "input"), *mlp),
        toy.info("head", (dim, VOCAB), ("input", "vocab"), "linear"),
    ]
    return unflatten_params({i.path: i for i in found})


def _init(infos: dict[str, Any]) -> Params:
    """Each matrix from N(0, 1/fan_in)."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return {
        name: jax.random.normal(next(keys), info.shape)
        * (1 if name == "embedding" else info.shape[0] ** -0.5)
        for name, info in flatten_params(infos).items()
    }


def _loss(params: Params, targets: Float[Array, "B V"]) -> Float[Array, ""]:
    p = flatten_params(params)

    def norm(x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    tokens = p["embedding"][
        _CONTEXTS + jnp.asarray([[0, VOCAB]])
    ]  # [B, 2, D]: each place has its own vectors
    h, last = norm(tokens), norm(tokens[:, -1])
    scores = jnp.einsum("bh,bsh->bs", last @ p["attention.q"], h @ p["attention.k"]) / h.shape[-1]
    mixed = jnp.einsum("bs,bsh->bh", jax.nn.softmax(scores), h @ p["attention.v"])
    x = tokens[:, -1] + mixed @ p["attention.o"]
    x = x + jax.nn.silu(norm(x) @ p["mlp.up"]) @ p["mlp.down"]
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(x @ p["head"]), axis=-1))


def _losses(dim: int, mup: bool) -> np.ndarray:
    """The loss after training at each rate: against the expected targets, the mean of the last five steps."""
    infos = _infos(dim)
    learner = LearnerConfig(
        learning_rate=1.0,
        optimizer=AfmOptimizerConfig(weight_decay=0.0),
        schedule=_Traced.Config(),
        skip_norm=None,
        mup=MuPConfig(base_dim=BASE_DIM) if mup else None,
    ).build(infos=infos)

    def step(carry: tuple[Params, Any], key: Array) -> tuple[tuple[Params, Any], Array]:
        params, state = carry
        which, drawn = jax.random.split(key)
        noise = jax.random.randint(drawn, _NEXT.shape, 0, VOCAB, dtype=_NEXT.dtype)
        targets = jnp.where(jax.random.bernoulli(which, NOISE, _NEXT.shape), noise, _NEXT)
        grads = jax.grad(_loss)(params, jax.nn.one_hot(targets, VOCAB))
        params, state, _ = learner.update(params, grads, state)
        return (params, state), _loss(params, _EXPECTED)

    def run(rate: Array) -> Array:
        _Traced.rate = rate
        params = unflatten_params(_init(infos))
        _, losses = jax.lax.scan(
            step, (params, learner.init(params)), jax.random.split(jax.random.key(1), STEPS)
        )
        return jnp.mean(losses[-5:])

    return np.asarray(jax.jit(lambda rates: jax.lax.map(run, rates))(jnp.asarray(RATES, jnp.float32)))


@pytest.fixture(scope="module")
def base_losses() -> np.ndarray:
    return _losses(BASE_DIM, mup=False)


@pytest.mark.parametrize("dim", [BASE_DIM // 2, BASE_DIM * 4])
def test_the_best_rate_stays_with_mup_and_moves_without(dim, base_losses):
    best = int(np.argmin(base_losses))
    assert 0 < best < len(RATES) - 1, base_losses  # the grid holds the optimum
    with_mup, without = _losses(dim, mup=True), _losses(dim, mup=False)
    assert int(np.argmin(with_mup)) == best, with_mup
    moved = int(np.argmin(without)) - best
    assert moved == (1 if dim < BASE_DIM else -1), without  # a wide model wants a lower rate
