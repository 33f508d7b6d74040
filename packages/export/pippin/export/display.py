"""What a person sees while a model is exported: a bar in a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Progress of a command, on standard error."""

    def __init__(self, what: str, num_steps: int):
        """
        Args:
            what: the command does: "exporting".
            num_steps: that it has.
        """
        self._console = Console(stderr=True)
        self._interactive = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._interactive,
        )
        self._task = self._bar.add_task("", total=num_steps)
        self._begun = 0
        self._last_line = time.monotonic()

    def __enter__(self) -> Display:  # noqa: PYI034  the checks of annotations in tests refuse Self
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is None:
            self._bar.update(self._task, completed=self._begun, description="done")
        self._bar.stop()

    def step(self, what: str) -> None:
        """The step before is done, and this one begins."""
        self._bar.update(self._task, completed=self._begun, description=what)
        self._begun += 1
        if not self._interactive:
            self._console.print(what, markup=False, highlight=False, soft_wrap=True)

    def part(self, what: str, done: int, total: int) -> None:
        """How far a part of the step is."""
        self._bar.update(self._task, description=f"{what} {done}/{total}")
        now = time.monotonic()
        if not self._interactive and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{what}: {done}/{total}", markup=False, highlight=False, soft_wrap=True)
