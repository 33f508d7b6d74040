"""The loss curve as a picture, and the run as a page."""

from __future__ import annotations

import base64
import html
from typing import Any

from pippin.core.atomic_file import write_atomic
from pippin.core.config_tree import config_text
from pippin.train.run_directory import RunDirectory
from pippin.train.summary import Summary, time_line
from pippin.train.trainer_config import TrainerConfig

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% } pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 13px }
ins { background: #dff0d8; text-decoration: none }
"""


def write_loss_plot(run: RunDirectory, cfg: TrainerConfig) -> None:
    """Draws loss.png: the training loss, and the cross-entropy of each evaluator, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = run.read_metrics()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    train = [m for m in lines if m["kind"] == "train"]
    axes.plot(*_points(train, "loss"), color="tab:blue", linewidth=1, label="training loss")
    for evaluator in cfg.evaluators:
        points = _points([m for m in lines if m["kind"] == evaluator.name], "cross_entropy")
        axes.plot(*points, "o-", color="tab:orange", label=f"{evaluator.name} cross-entropy")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = run.loss_plot.with_name(".loss.tmp.png")
    figure.savefig(temporary)
    pyplot.close(figure)
    temporary.replace(run.loss_plot)


def write_report(run: RunDirectory, cfg: TrainerConfig, summary: Summary) -> None:
    """Writes report.html, which holds all that it shows."""
    picture = base64.b64encode(run.loss_plot.read_bytes()).decode()
    last: dict[str, Any] = next((m for m in reversed(run.read_metrics()) if m["kind"] == "train"), {})
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{_e(summary.recipe)}</title><style>{_STYLE}</style>
<h1>{_e(summary.recipe)}</h1>
<p>{summary.num_params:,} parameters, {cfg.steps:,} steps on {_e(summary.devices)}. {_e(time_line(summary.ledger))}.</p>
<h2>Held-out perplexity</h2>
{_table([(name, f"{value:,.2f}") for name, value in summary.perplexities])}
<h2>Loss</h2>
<img alt="loss by step" src="data:image/png;base64,{picture}">
<h2>A sample</h2>
<pre>{_e(summary.prompt)}<ins>{_e(summary.continuation)}</ins></pre>
<h2>The last step</h2>
{_table([(k, f"{v:,.6g}") for k, v in last.items() if isinstance(v, float)])}
<h2>Input</h2>
<pre>{_e(summary.input_report)}</pre>
<h2>Config</h2>
<pre>{_e(config_text(cfg))}</pre>
<p>Fingerprint of the final state and of all samples: <code>{summary.fingerprint}</code></p>
</html>
"""
    write_atomic(run.report, page)


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    kept = [(m["step"], m[name]) for m in lines if m.get(name) is not None]
    return [s for s, _ in kept], [v for _, v in kept]


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(
        f'<tr><td>{_e(name)}</td><td class="number">{_e(value)}</td></tr>' for name, value in rows
    )
    return f"<table>{cells}</table>"


def _e(text: str) -> str:
    return html.escape(text)
