"""How well a model predicts text: for compressed models beside what they were made of."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pippin.core.batch import Batch
from pippin.core.module import merge, split
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType


class Evaluator:
    """Measures models of one config. They are computed in float32, and compiled once."""

    def __init__(self, cfg: CausalLMConfig, batches: Sequence[Batch]):
        """`batches` are of one shape; see `pippin.export.compress.text`."""
        cfg = cfg.set(activation_dtype=FloatType.FLOAT32)
        definition, self._like = nnx.eval_shape(lambda: split(cfg.build(rngs=nnx.Rngs(0))))
        self._batches = batches

        @jax.jit
        def measure(params: Any, batch: Batch) -> tuple[Any, Any]:
            _, metrics = merge(definition, params).loss(batch)
            return metrics["cross_entropy"] * metrics["weight"], metrics["weight"]

        self._measure = measure

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return int(sum(batch["loss_weights"].sum() for batch in self._batches))

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    def perplexity(self, params: Mapping[str, Any], progress: Callable[[], None] = lambda: None) -> float:
        """exp of the mean cross-entropy of a token, in nats.

        Args:
            params: the model's, as a tree of floats of any type.
            progress: called after each batch.
        """
        params = jax.tree.map(lambda like, values: jnp.asarray(values, like.dtype), self._like, dict(params))
        total = count = 0.0
        for batch in self._batches:
            loss, weight = self._measure(params, batch)
            total, count = total + float(loss), count + float(weight)
            progress()
        try:
            return math.exp(total / count)
        except OverflowError:
            return math.inf
