"""Metrics to a JSON Lines file and to TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter

from pippin.train.run_directory import RunDirectory


class MetricWriter:
    """Writes scalars by step, to both places at once."""

    def __init__(self, run: RunDirectory, first_step: int, *, quiet: bool = False):
        """
        Args:
            run: where to write.
            first_step: TensorBoard hides what an earlier attempt wrote for this step and later ones.
            quiet: write nothing, as where another process of the job does.
        """
        self._lines = Path(os.devnull if quiet else run.metrics).open("a")  # noqa: SIM115  closed by `close`
        self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step, write_to_disk=not quiet)

    def __enter__(self) -> MetricWriter:  # noqa: PYI034  as Display
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes one line `{"kind", "step", **values}`. A number that JSON cannot hold becomes null."""
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._lines.write(json.dumps({"kind": kind, "step": step, **line}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._lines.close()
        self._board.close()
