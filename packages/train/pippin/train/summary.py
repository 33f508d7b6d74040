"""What a finished run has to say: to the terminal, and to the report."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from pippin.core.processes import total
from pippin.train.ledger import Bucket
from pippin.train.run_directory import RunDirectory
from pippin.v1 import job_pb2 as pb

_NAMES = {
    Bucket.GOODPUT_BUCKET_INIT: "starting",
    Bucket.GOODPUT_BUCKET_DATA: "waiting for input",
    Bucket.GOODPUT_BUCKET_COMPILE: "compiling",
    Bucket.GOODPUT_BUCKET_STEP: "training",
    Bucket.GOODPUT_BUCKET_CHECKPOINT: "saving",
    Bucket.GOODPUT_BUCKET_RESTORE: "restoring",
    Bucket.GOODPUT_BUCKET_EVALUATION: "evaluating",
    Bucket.GOODPUT_BUCKET_OTHER: "finishing",
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a finished run."""

    recipe: str
    num_params: int
    devices: str
    untrained: float  # perplexities of held-out text
    unigram: float
    trained: float
    prompt: str
    continuation: str
    input_report: str
    ledger: pb.GoodputLedger
    fingerprint: str  # of the final state and of all samples: equal for equal runs

    @property
    def perplexities(self) -> list[tuple[str, float]]:
        """What the trained model is compared with, and itself."""
        return [
            ("untrained model", self.untrained),
            ("unigram baseline", self.unigram),
            ("trained model", self.trained),
        ]

    def text(self, run: RunDirectory, steps: int) -> str:
        """The lines that end a run in the terminal."""
        rows = "\n".join(f"  {name:<18}{value:>12,.2f}" for name, value in self.perplexities)
        return (
            f"\nheld-out perplexity, a token\n{rows}\n"
            f"\nsample (the prompt is held-out text; > marks what the model wrote)\n"
            f"{_quoted(self.prompt)}\n{_quoted(self.continuation, '> ')}\n"
            f"\n{self.num_params / 1e6:.1f}M parameters on {self.devices}; {time_line(self.ledger)}\n"
            f"{self.input_report}\n"
            f"fingerprint  {self.fingerprint}\n"
            f"checkpoint   {run.checkpoints / str(steps)}\n"
            f"loss curve   {run.loss_plot}\n"
            f"report       {run.report}\n"
        )


def _quoted(text: str, mark: str = "  ") -> str:
    return "\n".join(mark + line for line in text.splitlines())


def time_line(ledger: pb.GoodputLedger) -> str:
    """Where the time went, such as `182 s: 90% training, 1% waiting for input`."""
    wall = max(ledger.wall_seconds, 1e-9)
    parts = sorted(((e.seconds / wall, e.bucket) for e in ledger.entries), reverse=True)
    # How long training waited for input is always said.
    shown = [(share, b) for share, b in parts if share >= 0.005 or b == Bucket.GOODPUT_BUCKET_DATA]
    shares = ", ".join(f"{100 * s:.{0 if s >= 0.005 else 1}f}% {_NAMES.get(b, 'other')}" for s, b in shown)
    return f"{wall:.0f} s: {shares}"


def unigram_perplexity(counts: np.ndarray, batches: Any) -> float:
    """The perplexity of held-out targets under the frequencies of the training tokens, with one added to each.

    Args:
        counts: [V], how often each id is a target in the training text.
        batches: held-out `Batch`es: this process's rows of each.
    """
    log_p = np.log((counts + 1.0) / (counts.sum() + counts.size))
    nats = weight = 0.0
    for batch in batches:
        nats -= float(np.sum(log_p[batch["targets"]] * batch["loss_weights"]))
        weight += float(np.sum(batch["loss_weights"]))
    nats, weight = total(np.array([nats, weight]))
    return math.exp(nats / max(weight, 1.0))
