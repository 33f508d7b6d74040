"""Contenders in turn: each does some steps in every round, so that a slow hour slows all of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any, Self


@dataclasses.dataclass
class Result:
    """What was measured of a contender."""

    name: str
    facts: dict[str, Any]
    seconds: list[float] = dataclasses.field(default_factory=list)  # of a step, one a round
    peak_bytes: int = 0

    def ratios_to(self, other: Result) -> list[float]:
        """How many times as fast as another contender, in each round."""
        return [theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]


class Contender:
    """A process that speaks `protocol`."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None):
        self.name = name
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.result = Result(name, self._answer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def train(self, steps: int, record: bool) -> None:
        """Does some steps now."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if record:
            self.result.seconds.append(answer["seconds"] / steps)
            self.result.peak_bytes = answer["peak_bytes"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{errors[-2000:]}")
        return json.loads(line)


def spread(values: Sequence[float]) -> str:
    """`median (least to most)` of some ratios."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
