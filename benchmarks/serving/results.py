"""What a run of the benchmark found, and its tables."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.contest import spread
from benchmarks.serving.answers import Answer, Figures, Slo, figures
from benchmarks.serving.overhead import Steps


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a contender did with one load."""

    contender: str
    streams: int | None  # of a closed loop
    rate: float | None  # of an open loop: requests a second
    answers: list[Answer]
    figures: Figures

    def rows(self, number: int) -> list[dict[str, Any]]:
        """For a file of JSON lines: each request, then the figures."""
        of = {"turn": number, "contender": self.contender, "streams": self.streams, "rate": self.rate}
        requests = [{**of, "kind": "request", **answer.row()} for answer in self.answers]
        return [*requests, {**of, "kind": "figures", **self.figures.row()}]


@dataclasses.dataclass
class Results:
    """All of a run."""

    ours: str  # the contender that the others are compared with
    slo: Slo
    turns: list[Turn] = dataclasses.field(default_factory=list)
    ready_s: dict[str, float] = dataclasses.field(default_factory=dict)  # contender -> seconds
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # contender -> bytes
    steps: dict[int, Steps] = dataclasses.field(default_factory=dict)  # streams -> of our server
    idle_steps: dict[int, Steps] = dataclasses.field(default_factory=dict)  # streams -> without a model
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # step -> part -> seconds

    def closed(self, streams: int) -> dict[str, list[Turn]]:
        """The turns of a closed loop: contender -> one a round."""
        return _by_contender([t for t in self.turns if t.streams == streams])

    def open(self) -> dict[str, list[Turn]]:
        """The turns of open loops: contender -> one a rate, from the least."""
        return _by_contender(sorted((t for t in self.turns if t.rate is not None), key=lambda t: t.rate or 0))

    @property
    def all_streams(self) -> list[int]:
        """Of the closed loops."""
        return sorted({t.streams for t in self.turns if t.streams is not None})


def markdown(results: Results) -> str:
    """All tables."""
    tables = [_closed(results, streams) for streams in results.all_streams]
    if results.open():
        tables += [_open(results), _saturation(results)]
    tables += [_memory(results), _overhead(results), _parts(results)]
    return "\n\n".join(filter(None, tables)) + "\n"


def _closed(results: Results, streams: int) -> str:
    turns = results.closed(streams)
    rows = []
    for name, rounds in turns.items():
        whole = _pooled(rounds, results.slo)
        ratio = same = ""
        if name != results.ours:
            pairs = list(zip(turns[results.ours], rounds, strict=True))
            ratio = spread([ours.figures.tokens_per_s / its.figures.tokens_per_s for ours, its in pairs])
            answers = [(a, b) for ours, its in pairs for a, b in zip(ours.answers, its.answers, strict=True)]
            same = f"{sum(a.tokens == b.tokens for a, b in answers)} of {len(answers)}"
        rate = statistics.median(t.figures.tokens_per_s for t in rounds)
        rows.append([name, f"{rate:.1f}", ratio, same, *_latencies(whole)])
    head = [
        f"{streams} stream{'s' * (streams > 1)}",
        "tokens/s",
        f"{results.ours} is times as fast",
        "same answers",
        *_LATENCIES,
    ]
    return _table(head, rows)


def _open(results: Results) -> str:
    rows = []
    for rate in sorted({t.rate for turns in results.open().values() for t in turns if t.rate is not None}):
        for name, turns in results.open().items():
            for turn in (t for t in turns if t.rate == rate):
                f = turn.figures
                rows.append(
                    [
                        f"{rate:.2f}",
                        name,
                        f"{f.tokens_per_s:.1f}",
                        f"{f.goodput_per_s:.2f}",
                        f"{f.shed:.0%}",
                        f"{f.unfinished:.0%}",
                        *_latencies(f),
                    ]
                )
    head = ["requests/s", "", "tokens/s", "goodput, requests/s", "shed", "unfinished", *_LATENCIES]
    return _table(head, rows)


def _saturation(results: Results) -> str:
    rows = []
    for name, turns in results.open().items():
        peak = max(turns, key=lambda t: t.figures.tokens_per_s)
        last = turns[-1]
        share = (
            last.figures.tokens_per_s / peak.figures.tokens_per_s if peak.figures.tokens_per_s else math.nan
        )
        best = max(t.figures.goodput_per_s for t in turns)
        rows.append(
            [
                name,
                f"{peak.figures.tokens_per_s:.1f} at {peak.rate:.2f}/s",
                f"{last.figures.tokens_per_s:.1f} at {last.rate:.2f}/s",
                "-" if math.isnan(share) else f"{share:.0%}",
                f"{_seconds(peak.figures.first_s[1])} and {_seconds(last.figures.first_s[1])}",
                f"{best:.2f} and {last.figures.goodput_per_s:.2f}",
                _seconds(last.figures.shed_s),
            ]
        )
    head = ["past saturation", "most tokens/s", "tokens/s at the highest rate", "of the most"]
    head += ["first token P99, at both", "goodput, best and at the highest rate", "longest refusal"]
    return _table(head, rows)


def _memory(results: Results) -> str:
    rows = [
        [name, f"{results.ready_s.get(name, math.nan):.1f}", f"{peak / 2**30:.2f}"]
        for name, peak in results.peak_bytes.items()
    ]
    return _table(["", "ready after, s", "peak memory, GiB"], rows)


def _overhead(results: Results) -> str:
    rows = []
    for streams, idle in results.idle_steps.items():
        if (real := results.steps.get(streams)) is None:
            continue
        cost_s = idle.cpu_s / idle.count
        rows.append(
            [
                str(streams),
                f"{1000 * real.model_s / real.count:.1f}",
                f"{1000 * (real.wall_s - real.model_s) / real.count:.2f}",
                f"{1 - real.model_s / real.wall_s:.1%}",
                f"{1000 * cost_s:.2f}",
                f"{cost_s / real.step_s:.1%}",
            ]
        )
    head = ["streams", "in the model, ms a step", "between two steps, ms", "share"]
    return _table([*head, "work of gRPC, scheduler and engine, ms of a CPU a step", "share of a step"], rows)


def _parts(results: Results) -> str:
    names = list(dict.fromkeys(part for parts in results.parts.values() for part in parts))
    rows = []
    for step, parts in results.parts.items():
        total = sum(parts.values())
        shares = [f"{1000 * parts.get(n, 0):.1f} ({parts.get(n, 0) / total:.0%})" for n in names]
        rows.append([step, f"{1000 * total:.1f}", *shares])
    return _table(["step, ms", "in all", *names], rows)


_LATENCIES = ["first token P50 / P99", "per token P50 / P99", "between tokens P50 / P99"]


def _latencies(f: Figures) -> list[str]:
    return [f"{_seconds(a)} / {_seconds(b)}" for a, b in (f.first_s, f.per_token_s, f.gap_s)]


def _pooled(rounds: Sequence[Turn], slo: Slo) -> Figures:
    """The figures of all requests of some rounds."""
    return figures([a for turn in rounds for a in turn.answers], (0.0, math.inf), slo)


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "never" if value > 0 else "-"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _by_contender(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.contender, []).append(turn)
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, in columns."""
    if not rows:
        return ""
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in lines
    )
