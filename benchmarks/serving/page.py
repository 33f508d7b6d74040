"""The report as a page: its tables, and charts of them."""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from typing import Any

from benchmarks.serving.results import Results

# The same for a contender in all charts; ours has another name in the open loops.
_COLORS = {"pippin, no drafts": "C1", "llama.cpp": "C2", "vLLM": "C3", "Hugging Face": "C4"}
_OURS = "C0"


def page(results: Results, tables: str, about: str) -> str:
    """HTML that needs no other file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), dpi=110, layout="constrained")
    _closed(axes[0][0], results)
    _open(axes[0][1], results, lambda f: f.tokens_per_s, "tokens/s")
    _open(axes[1][0], results, lambda f: f.goodput_per_s, "requests/s within the SLO")
    _open(axes[1][1], results, lambda f: f.first_s[1], "first token, P99 of admitted requests, s")
    axes[1][1].axhline(results.slo.first_s, color="gray", linestyle=":", label="SLO")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    encoded = base64.b64encode(picture.getvalue()).decode()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>serving benchmark</title>'
        f"<h1>Serving</h1><p>{html.escape(about)}</p>"
        f'<img alt="charts" src="data:image/png;base64,{encoded}"><pre>{html.escape(tables)}</pre></html>\n'
    )


def _closed(axis: Any, results: Results) -> None:
    all_streams = results.all_streams
    names = list(dict.fromkeys(name for streams in all_streams for name in results.closed(streams)))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        rates = [
            statistics.median([t.figures.tokens_per_s for t in results.closed(s).get(name, [])] or [math.nan])
            for s in all_streams
        ]
        axis.bar(
            [x + width * i for x in range(len(all_streams))],
            rates,
            width=0.95 * width,
            label=name,
            color=_COLORS.get(name, _OURS),
        )
    axis.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(all_streams))],
        [f"{s} stream{'s' * (s > 1)}" for s in all_streams],
    )
    axis.set_ylabel("tokens/s")
    axis.set_title("closed loop")


def _open(axis: Any, results: Results, value: Any, label: str) -> None:
    for name, turns in results.open().items():
        axis.plot(
            [t.rate for t in turns],
            [value(t.figures) for t in turns],
            "o-",
            label=name,
            color=_COLORS.get(name, _OURS),
        )
    axis.set_xlabel("requests/s that come")
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.set_title("open loop")
