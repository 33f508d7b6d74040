"""What a person sees while a run goes on: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Progress of a run, on standard error."""

    def __init__(self, total_steps: int, first_step: int = 0, *, quiet: bool = False):
        """
        Args:
            total_steps: of the run.
            first_step: that it goes on from.
            quiet: show nothing, as where another process of the job does.
        """
        self._total, self._first = total_steps, first_step
        self._console = Console(stderr=True, quiet=quiet)
        self._interactive = sys.stderr.isatty() and not quiet
        self._started, self._last_line = time.monotonic(), 0.0
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            disable=not self._interactive,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=first_step, loss=float("nan"), rate=0.0
        )

    def __enter__(self) -> Display:  # noqa: PYI034  the checks of annotations in tests refuse Self
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Shows how far the run is."""
        self._bar.update(self._task, completed=step, loss=loss, rate=tokens_per_s)
        now = time.monotonic()
        if self._interactive or (now - self._last_line < _SECONDS_BETWEEN_LINES and step < self._total):
            return
        self._last_line = now
        left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
        self.say(
            f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  "
            f"{round(left) // 60} min {round(left) % 60} s left"
        )
