"""Builds a config without memory, and runs it for real on a few tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from pippin.core.component import from_text, to_text
from pippin.core.module import Params, merge, split
from pippin.layers.causal_lm_config import CausalLMConfig
from tests.complexity.variants import VOCAB_SIZE

_SHAPE = (2, 10)

# Each program runs a few times on a few tokens: compiling it well would take longer than it saves.
_QUICK = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of random tokens, one document a row."""

    tokens: np.ndarray
    positions: np.ndarray

    @classmethod
    def random(cls) -> Batch:
        rng = np.random.default_rng(0)
        positions = np.broadcast_to(np.arange(_SHAPE[1], dtype=np.int32), _SHAPE)
        return cls(rng.integers(0, VOCAB_SIZE, _SHAPE, dtype=np.int32), positions)

    def at(self, positions: np.ndarray) -> Batch:
        """The same tokens at other positions."""
        return dataclasses.replace(self, positions=positions)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a model trains on."""
        return {
            "tokens": self.tokens,
            "targets": np.roll(self.tokens, -1, axis=1),
            "positions": self.positions,
            "segment_ids": np.ones(_SHAPE, np.int32),
            "loss_weights": np.ones(_SHAPE, np.float32),
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of a model, which is abstract, and what went in."""

    model: Any
    params: Params
    loss: Array
    metrics: dict[str, Array]
    logits: Array | None  # without gradients only
    gradients: Params | None


def build_abstract(cfg: CausalLMConfig) -> Any:
    """The model without values, whose loss was traced: every shape and dtype in it fits.

    Raises:
        AssertionError: its loss is no float32 scalar, or its wire form does not give the config again.
    """
    assert from_text(to_text(cfg)) == cfg, f"the text of a config gives another: {cfg}"
    model = _abstract(cfg)
    definition, params = split(model)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), Batch.random().arrays())
    loss, _ = jax.eval_shape(lambda p, b: merge(definition, p).loss(b), params, batch)
    assert loss.shape == () and loss.dtype == jnp.float32, f"the loss is {loss}"
    return model


def run(
    cfg: CausalLMConfig, batch: Batch, params: Params | None = None, *, with_gradients: bool = False
) -> Run:
    """Runs a model on a batch, with these parameters or with those that it starts from.

    Logits or gradients: both would take twice as long to compile.

    Raises:
        AssertionError: the loss, a logit or a gradient is not finite.
    """
    if params is None:
        params = _initialise(cfg)
    loss, metrics, logits, gradients = _program(cfg, with_gradients)(params, batch.arrays())
    for name, values in (("loss", loss), ("logits", logits), ("gradients", gradients)):
        assert all(bool(jnp.all(jnp.isfinite(v))) for v in jax.tree.leaves(values)), f"{name}: not finite"
    return Run(_abstract(cfg), params, loss, metrics, logits, gradients)


# Kept for good: all features run the same models without them, and all of these are tiny.
@functools.cache
def _abstract(cfg: CausalLMConfig) -> Any:
    return nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))


@functools.cache
def _initialise(cfg: CausalLMConfig) -> Params:
    return jax.jit(lambda: split(cfg.build(rngs=nnx.Rngs(0)))[1], compiler_options=_QUICK)()


@functools.cache
def _program(cfg: CausalLMConfig, with_gradients: bool) -> Callable[..., Any]:
    definition, _ = split(_abstract(cfg))

    def program(params: Params, batch: Any) -> Any:
        def loss(params: Params) -> Any:
            return merge(definition, params).loss(batch)

        if with_gradients:
            (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return value, metrics, None, gradients
        logits = merge(definition, params)(batch["tokens"], batch["positions"])
        return *loss(params), logits, None

    return jax.jit(program, compiler_options=_QUICK)
