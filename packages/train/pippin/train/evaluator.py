"""Evaluators: what is measured of a model while it trains."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pippin.core.batch import Batch
from pippin.core.module import Params, merge
from pippin.train.trainer_config import PerplexityConfig


class Perplexity:
    """Measures `exp(mean cross-entropy)` a token over held-out batches."""

    Config = PerplexityConfig

    def __init__(
        self,
        cfg: PerplexityConfig,
        *,
        definition: Any,
        batches: Callable[[int, str | None], Iterable[Batch]],
        place: Callable[[Batch], Batch],
    ):
        """
        Args:
            cfg: when, and on how many batches.
            definition: of the model, from `split`.
            batches: called with `max_batches` and `task`; gives the same batches each time.
            place: puts a batch on the devices.
        """
        self._cfg, self._batches, self._place = cfg, batches, place

        def sums(params: Params, batch: Batch) -> dict[str, jax.Array]:
            metrics = merge(definition, params).loss(batch)[1]
            weight = metrics["weight"]
            return {name: metrics[name] * weight for name in ("cross_entropy", "accuracy")} | {
                "tokens": weight
            }

        self._sums = jax.jit(sums)

    def is_due(self, step: int) -> bool:
        """Whether to run after so many steps."""
        return step % self._cfg.every_steps == 0

    def __call__(self, params: Params) -> dict[str, float]:
        """`perplexity`, `cross_entropy` (nats a token), `accuracy`, and the number of `tokens`."""
        totals: dict[str, jax.Array] | None = None
        for batch in self._batches(self._cfg.max_batches, self._cfg.task):
            sums = self._sums(params, self._place(batch))
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        if totals is None:
            return {}
        tokens = max(float(totals["tokens"]), 1.0)
        cross_entropy = float(totals["cross_entropy"]) / tokens
        return {
            "perplexity": math.exp(min(cross_entropy, 700.0)),  # beyond it, a float overflows
            "cross_entropy": cross_entropy,
            "accuracy": float(totals["accuracy"]) / tokens,
            "tokens": float(totals["tokens"]),
        }
