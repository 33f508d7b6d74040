"""One training step, as a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pippin.core.batch import Batch
from pippin.core.module import Params, merge
from pippin.train.learner.accumulate import accumulate, target_weight
from pippin.train.learner.learner import Learner, LearnerState

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """All that a step changes: what a checkpoint holds beside the input's state."""

    step: Int[Array, ""]  # steps done, skipped ones included
    params: Params
    learner: LearnerState


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(definition: Any, learner: Learner, microbatches: int) -> Step:
    """The step function of a model and a learner. Jit it with the state donated.

    The metrics describe the parameters that made the loss, not those that the step returns.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(trainable: Params, rows: Batch) -> tuple[Float[Array, ""], Metrics]:
            return merge(definition, learner.join(state.params, trainable)).loss(rows)

        def loss_and_grad(rows: Any) -> Any:
            return jax.value_and_grad(loss, has_aux=True)(learner.trainable(state.params), rows)

        (value, metrics), grads = accumulate(loss_and_grad, batch, microbatches)
        params, learner_state, learner_metrics = learner.update(state.params, grads, state.learner)
        new = TrainState(state.step + 1, params, learner_state)
        # Accumulation makes means of metrics; the weight is a sum.
        return new, {"loss": value, **metrics, "weight": target_weight(batch), **learner_metrics}

    return step
