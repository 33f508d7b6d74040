"""The training loop: what happens in a run, in order.

The order within a step is what makes a resumed run equal to an uninterrupted
one: a checkpoint after step k holds the state that step k made and the input's
state after batch k, so that the next thing to happen is step k + 1 on batch k + 1.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from pippin.core.batch import Batch
from pippin.core.checkpoint import Checkpointer
from pippin.train.display import Display
from pippin.train.errors import Preempted
from pippin.train.ledger import Bucket, Ledger
from pippin.train.metric_writer import MetricWriter
from pippin.train.sample_digest import SampleDigest
from pippin.train.step import Step, TrainState
from pippin.train.trainer import Trainer

INPUT_STATE, SAMPLES = "input", "samples"  # what a checkpoint holds beside the training state


@runtime_checkable
class Input(Protocol):
    """What the loop needs of an input (interface "input")."""

    def __next__(self) -> Batch: ...
    def state(self) -> bytes: ...
    def restore(self, state: bytes) -> None: ...


def restore(
    trainer: Trainer, checkpointer: Checkpointer, source: Input
) -> tuple[TrainState | None, bytes, list[str]]:
    """The newest whole checkpoint, with the input moved to where it was.

    Returns:
        The state, or None where there is no checkpoint; the digest of all samples
        up to it; and what to tell the user of damaged checkpoints.
    """
    found = checkpointer.load(trainer.template)
    if found is None:
        return None, b"", []
    source.restore(found.extra[INPUT_STATE])
    return found.state, found.extra[SAMPLES], [f"damaged checkpoint set aside: {s}" for s in found.skipped]


def run(
    trainer: Trainer,
    step_fn: Step,
    state: TrainState,
    source: Input,
    samples: SampleDigest,
    *,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    display: Display,
    ledger: Ledger,
) -> TrainState:
    """Trains up to the config's last step. Returns the final state.

    Raises:
        Preempted: a signal asked to stop, this process or another of the job; the state after the last step is saved.
        CheckpointError: the last save failed.
        DataError: the input failed.
        DivergenceError: too many steps in a row were skipped.
    """
    cfg = trainer.cfg
    first = int(state.step)
    log = _Log(trainer, writer, display, ledger, samples.share.count)
    if first == 0:
        _evaluate(trainer, 0, state, writer, display, ledger, always=True)
    with _stop_requested() as is_stopping:
        for step in range(first + 1, cfg.steps + 1):
            with ledger.into(Bucket.GOODPUT_BUCKET_DATA):
                batch = next(source)
            samples.add(step, batch)
            state, metrics = step_fn(state, trainer.place(batch))
            # Reads the metrics of the step before, so that the device is never without work.
            log.add(step, metrics, batch)
            checkpointer.check()
            last, stop = step == cfg.steps, is_stopping(step)
            # Measure before the save: a run that goes on from this step finds its metrics written.
            _evaluate(trainer, step, state, writer, display, ledger, always=last)
            if last or stop or checkpointer.should_save(step):
                log.flush()
                jax.block_until_ready(state)  # so that the ledger counts the step as a step
                with ledger.into(Bucket.GOODPUT_BUCKET_CHECKPOINT):
                    checkpointer.save(step, state, {INPUT_STATE: source.state(), SAMPLES: samples.total()})
            if stop and not last:
                with ledger.into(Bucket.GOODPUT_BUCKET_CHECKPOINT):
                    checkpointer.wait()
                raise Preempted(f"stopped by a signal after step {step}, which is saved")
    with ledger.into(Bucket.GOODPUT_BUCKET_CHECKPOINT):
        checkpointer.wait()
    return state


def _evaluate(
    trainer: Trainer,
    step: int,
    state: TrainState,
    writer: MetricWriter,
    display: Display,
    ledger: Ledger,
    always: bool,
) -> None:
    for name, evaluator in trainer.evaluators.items():
        if always or evaluator.is_due(step):
            jax.block_until_ready(state)
            with ledger.into(Bucket.GOODPUT_BUCKET_EVALUATION), trainer.on_mesh():
                values = evaluator(trainer.measured(state))
            writer.write(name, step, values)
            if "perplexity" in values:
                display.say(f"step {step}: {name} perplexity {values['perplexity']:,.2f}")


class _Log:
    """Writes each `log_every_steps`-th step's metrics, one step late."""

    def __init__(self, trainer: Trainer, writer: MetricWriter, display: Display, ledger: Ledger, parts: int):
        self._parts = parts  # of a batch, of which this process has one
        self._trainer, self._writer, self._display, self._ledger = trainer, writer, display, ledger
        self._pending: tuple[int, Any] | None = None
        self._tokens, self._since = 0.0, self._clock()

    def _clock(self) -> float:
        """Seconds, but for those of evaluations."""
        return time.monotonic() - self._ledger.seconds(Bucket.GOODPUT_BUCKET_EVALUATION)

    def add(self, step: int, metrics: Any, batch: Batch) -> None:
        self.flush()
        self._tokens += float(np.sum(batch["loss_weights"])) * self._parts
        if step % self._trainer.cfg.log_every_steps == 0 or step == self._trainer.cfg.steps:
            self._pending = step, metrics

    def flush(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = self._clock()
        values["tokens_per_s"] = self._tokens / (now - self._since)
        self._tokens, self._since = 0.0, now
        self._writer.write("train", step, values)
        self._display.step(step, values["loss"], values["tokens_per_s"])
        self._trainer.learner.check(values)


@contextmanager
def _stop_requested() -> Iterator[Callable[[int], bool]]:
    """Says of each step whether to stop after it, because of SIGTERM or SIGINT; a second signal acts as it did before.

    Of several processes one may get the SIGTERM. JAX catches it, tells the others behind the back of the training, and
    has all of them stop after the same step. That costs 15 us a step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # signals reach the main thread alone
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda step: stop.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
