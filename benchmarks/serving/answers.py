"""What came of the requests of a load, and what it says: percentiles, rates, and how many were served well."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any


class Ending(enum.Enum):
    """How a request ended."""

    WHOLE = "whole"
    SHED = "shed"  # refused at once, to be tried again later
    UNFINISHED = "unfinished"  # when the measurement ended
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one request. Times are seconds since the load began."""

    sent_s: float  # when it was due, even where the client was late
    token_s: tuple[float, ...]  # when each token came
    ending: Ending
    ended_s: float
    tokens: tuple[int, ...] = ()  # their ids

    @property
    def first_s(self) -> float:
        """To the first token; infinite where none came."""
        return self.token_s[0] - self.sent_s if self.token_s else math.inf

    @property
    def per_token_s(self) -> float:
        """A token after the first one, on average; infinite where there is only one."""
        if len(self.token_s) < 2:
            return math.inf
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

    def row(self) -> dict[str, Any]:
        """For a file of JSON lines."""
        times = [round(t, 5) for t in self.token_s]
        return {
            "sent_s": round(self.sent_s, 5),
            "ended_s": round(self.ended_s, 5),
            "ending": self.ending.value,
            "token_s": times,
            "tokens": self.tokens,
        }


@dataclasses.dataclass(frozen=True)
class Slo:
    """What a request must keep to count as served well."""

    first_s: float
    per_token_s: float

    def keeps(self, answer: Answer) -> bool:
        """Whether the answer is whole, began in time, and went on fast enough."""
        return (
            answer.ending is Ending.WHOLE
            and answer.first_s <= self.first_s
            and (len(answer.token_s) < 2 or answer.per_token_s <= self.per_token_s)
        )

    def longest_s(self, max_tokens: int) -> float:
        """How long a request takes at most that keeps it: one that takes longer cannot, whatever comes."""
        return self.first_s + (max_tokens - 1) * self.per_token_s


def percentile(values: Iterable[float], percent: float) -> float:
    """The least value that so many percent of all do not exceed (nearest rank); NaN of nothing."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


@dataclasses.dataclass(frozen=True)
class Figures:
    """A load in numbers. Latencies are of requests that were admitted: (P50, P99), in seconds."""

    requests: int
    tokens_per_s: float  # that came in the window
    goodput_per_s: float  # requests that kept the SLO
    shed: float  # share of the requests
    unfinished: float  # share of the requests, failed ones too
    shed_s: float  # the longest that a refusal took; NaN where there was none
    first_s: tuple[float, float]
    per_token_s: tuple[float, float]
    gap_s: tuple[float, float]  # between two tokens of a request

    def row(self) -> dict[str, Any]:
        """For a file of JSON lines; what is not finite is null."""
        return {
            name: [_finite(v) for v in value] if isinstance(value, tuple) else _finite(value)
            for name, value in dataclasses.asdict(self).items()
        }


def figures(everything: Sequence[Answer], window: tuple[float, float], slo: Slo) -> Figures:
    """What some answers say.

    Args:
        everything: what came of all requests of a load.
        window: from when to when requests are counted that were sent, and tokens that came, in seconds since the load began.
        slo: what counts as served well.
    """
    start, stop = window
    tokens = sum(start <= t < stop for answer in everything for t in answer.token_s)
    answers = [a for a in everything if start <= a.sent_s < stop]
    admitted = [a for a in answers if a.ending is not Ending.SHED]
    shed = [a for a in answers if a.ending is Ending.SHED]
    cut = [a for a in admitted if a.ending is not Ending.WHOLE]
    gaps = [b - a for x in admitted for a, b in itertools.pairwise(x.token_s)]

    def both(values: Iterable[float]) -> tuple[float, float]:
        kept = list(values)
        return percentile(kept, 50), percentile(kept, 99)

    return Figures(
        requests=len(answers),
        tokens_per_s=tokens / (stop - start),
        goodput_per_s=sum(map(slo.keeps, answers)) / (stop - start),
        shed=len(shed) / max(1, len(answers)),
        unfinished=len(cut) / max(1, len(answers)),
        shed_s=max((a.ended_s - a.sent_s for a in shed), default=math.nan),
        first_s=both(a.first_s for a in admitted),
        per_token_s=both(a.per_token_s for a in admitted if len(a.token_s) > 1),
        gap_s=both(gaps),
    )


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
