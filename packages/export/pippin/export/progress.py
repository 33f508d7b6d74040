"""How far an export is: a bar in a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class Advance(Protocol):
    """Is told how many more bytes are done."""

    def __call__(self, nbytes: int) -> None: ...


@contextmanager
def bytes_progress(what: str, total_bytes: int) -> Iterator[Advance]:
    """A bar on standard error while the block runs."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)


def no_progress(nbytes: int) -> None:
    """Shows nothing."""
