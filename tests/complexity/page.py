"""The report as one page of HTML, which holds all that it shows."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from tests.complexity import lines
from tests.complexity.experiment import FeatureResult, Results
from tests.complexity.tables import FEATURE_HEAD, PAPER_HEAD, feature_rows, paper_rows, sweep_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } tr:last-child.ours { font-weight: bold; background: #eef6ee }
img { max-width: 100% } pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


def write_page(path: Path, results: Results, plot: Path) -> None:
    """Writes the page, with the picture at `plot` inside."""
    picture = base64.b64encode(plot.read_bytes()).decode()
    definitions = (lines.__doc__ or "").partition("Definitions:\n")[2]
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>LoC-complexity of pippin</title><style>{_STYLE}</style>
<h1>What a new feature costs</h1>
<p>Lines of existing modules that change to add a feature to 20 model variants x 10 attention variants.
The last row was measured by the program that wrote this page. The others are the paper's own estimates
(arXiv:2507.05411, table 2), which it derives by hand; nobody measured them.</p>
{_table(PAPER_HEAD, paper_rows(results), last="ours")}
<h2>Against the size of the system</h2>
<img alt="lines changed against N" src="data:image/png;base64,{picture}">
<p>Solid: measured, on random compositions. Dashed: the paper's estimate at 20 model variants and 10
attention variants (the dot), in proportion to N where the paper's order is O(NM) or O(N), constant where it
is O(M) or O(1). Its figures are for one variant of the feature and leave the feature itself out; so do ours.</p>
<pre>{_e(sweep_table(results))}</pre>
<h2>What was done</h2>
{_table(FEATURE_HEAD, feature_rows(results))}
<p>Of each feature: composed into all configs of the grid, with every value outside of the replaced components
compared; built by tracing model and loss; and run for real on a subset that holds every model variant and
every attention variant, where a position encoding must change the logits and an expert must get a gradient
in every layer. The features of a user lie in one file that no package imports or names.
Watched: {results.files} files with {results.lines:,} lines, {results.functions:,} functions and classes.</p>
<h2>The modifiers</h2>
<p>All that a user writes, each with the imports that it needs:</p>
{"".join(_modifier(feature) for feature in results.features)}
<h2>Where packages name the features</h2>
<p>No integration needs these lines. They are defaults, published models, file formats, and text of errors.</p>
<pre>{_e(_mentions(results))}</pre>
<h2>Definitions</h2>
<pre>{_e(definitions)}</pre>
</html>
""")


def _modifier(feature: FeatureResult) -> str:
    text = "\n".join(feature.modifier)
    return f"<h3>{_e(feature.name)}: {len(feature.modifier)} lines</h3><pre>{_e(text)}</pre>"


def _mentions(results: Results) -> str:
    return "\n".join(
        f"{feature.name}: " + (", ".join(f"{p} ({n})" for p, n in feature.mentions.items()) or "nowhere")
        for feature in results.features
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], last: str = "") -> str:
    text = "<tr>" + "".join(f"<th>{_e(cell)}</th>" for cell in head) + "</tr>\n"
    for i, row in enumerate(rows):
        mark = f' class="{last}"' if last and i == len(rows) - 1 else ""
        text += f"<tr{mark}>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>\n"
    return f"<table>\n{text}</table>"


def _e(text: str) -> str:
    return html.escape(text)
