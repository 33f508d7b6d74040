"""An export as a page that needs no other file: what its weights cost, in tables and charts."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pippin.export.summary import HEADER, cost_rows, measured_rows
from pippin.export.weight_kinds import by_kind, by_layer
from pippin.v1 import export_pb2 as pb

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } tr:last-child.total td { border-top: 1px solid #999 }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #444 } code { font-size: 13px }
"""
_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f", "#bab0ac")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 260, 60, 30


def report_page(name: str, exported: pb.ExportManifest) -> str:
    """HTML about an export."""
    kinds = by_kind(exported.weights)
    colors = {kind: _COLORS[i % len(_COLORS)] for i, kind in enumerate(kinds)}
    functions = "".join(f"<h3>{_e(f.name)}</h3>{_interface(f)}" for f in exported.functions)
    measured = measured_rows(exported)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{_e(name)}</title><style>{_STYLE}</style>
<h1>{_e(name)}</h1>
<p>For {_e(exported.target)}: {exported.bits_per_weight:.3f} bits a weight, a context of {exported.context_length} tokens,
{exported.prefill_length} of a prompt at a time. {_adapter(exported)}</p>
<h2>What weights cost</h2>
{_table(HEADER, cost_rows(exported), total=True)}
<h2>Bits a weight</h2>
{_bars([(kind, cost.bits_per_weight, colors[kind]) for kind, cost in kinds.items()])}
<h2>Bytes by layer</h2>
{_stacks(exported, colors)}
<h2>Measured</h2>
{_table(("", ""), measured) if measured else "<p>Nothing yet.</p>"}
<h2>The program</h2>
{functions}
<p>Weights: <code>{_e(exported.model_signature)}</code></p>
</html>
"""


def _adapter(exported: pb.ExportManifest) -> str:
    if not exported.HasField("adapter"):
        return "It takes no adapters."
    layout = exported.adapter
    return f"It takes adapters up to rank {layout.rank}: {layout.length:,} numbers, {len(layout.slots)} matrices."


def _interface(function: pb.ExportedFunction) -> str:
    rows = [
        (kind, tensor.name, f"{tensor.dtype} {list(tensor.shape)}")
        for kind, tensors in (
            ("input", function.inputs),
            ("state", function.states),
            ("output", function.outputs),
        )
        for tensor in tensors
    ]
    return _table(("", "name", "type"), rows, numbers=False)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False, numbers: bool = True
) -> str:
    def cell(text: str) -> str:
        is_number = numbers and text[:1].isdigit()
        return f"<td{' class=number' * is_number}>{_e(text)}</td>"

    lines = ["<tr>" + "".join(f"<th>{_e(text)}</th>" for text in header) + "</tr>"]
    for i, row in enumerate(rows):
        last = total and i == len(rows) - 1
        lines.append(f"<tr{' class=total' * last}>" + "".join(map(cell, row)) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _bars(bars: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars: a name, a value and a color each."""
    most = max(value for _, value, _ in bars)
    left, height = 130, 24
    lines = []
    for i, (name, value, color) in enumerate(bars):
        y, width = i * height, (_WIDTH - left - 60) * value / most
        lines.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{_e(name)}</text>')
        lines.append(
            f'<rect x="{left}" y="{y + 3}" width="{width:.1f}" height="{height - 6}" fill="{color}"/>'
        )
        lines.append(f'<text x="{left + width + 6:.1f}" y="{y + 16}">{value:.2f}</text>')
    return _svg(len(bars) * height, lines)


def _stacks(exported: pb.ExportManifest, colors: dict[str, str]) -> str:
    """A column for each layer, of its kinds of weights."""
    layers = by_layer(exported.weights)
    most = max(sum(cost.num_bytes for cost in kinds.values()) for kinds in layers.values())
    step = (_WIDTH - _LEFT) / len(layers)
    room = _HEIGHT - _BOTTOM
    lines = [f'<text x="{_LEFT - 8}" y="12" text-anchor="end">{most / 1e6:,.1f} MB</text>']
    lines.append(f'<text x="{_LEFT - 8}" y="{room}" text-anchor="end">0</text>')
    for i, (layer, kinds) in enumerate(layers.items()):
        y = float(room)
        for kind, cost in kinds.items():
            height = room * cost.num_bytes / most
            y -= height
            title = (
                f"{kind}, layer {layer}: {cost.bits_per_weight:.2f} bits a weight, {cost.num_bytes:,} bytes"
            )
            lines.append(
                f'<rect x="{_LEFT + i * step:.1f}" y="{y:.1f}" width="{0.85 * step:.1f}" height="{height:.1f}" '
                f'fill="{colors[kind]}"><title>{_e(title)}</title></rect>'
            )
        if len(layers) <= 40 or i % 5 == 0:
            x = _LEFT + (i + 0.42) * step
            lines.append(f'<text x="{x:.1f}" y="{room + 16}" text-anchor="middle">{_e(layer)}</text>')
    legend = " ".join(
        f'<span style="color:{color}">&#9632;</span> {_e(kind)}' for kind, color in colors.items()
    )
    return _svg(_HEIGHT, lines) + f"<p>{legend}</p>"


def _svg(height: int, lines: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">{"".join(lines)}</svg>'


def _e(text: str) -> str:
    return html.escape(text)
