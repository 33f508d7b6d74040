"""Estimates as a page to click through, which needs no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence

from pippin.export.latency.chips import BANDWIDTH_SHARE, CHIPS, COMPUTE_SHARE
from pippin.export.latency.operations import Operation

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .15rem .8rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } tr.group { cursor: pointer } tr.group:hover { background: #eef }
tr.group td { border-top: 1px solid #ddd } tr.inner td:first-child { padding-left: 1.5rem; color: #555 }
.bar { background: #4e79a7; height: .7rem; display: inline-block } .memory { background: #f28e2b }
td:last-child { width: 30%; text-align: left } select { font: inherit; margin-right: 1rem }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const pick = id => document.getElementById(id).value;
const open = new Set();
const cell = (row, text) => { const td = row.insertCell(); td.textContent = text; return td };
function timed(o, chip) {
  const memory = o.bytes / (chip.bandwidth * 1e9 * data.bandwidthShare);
  const compute = o.flops / (chip.tops * 1e12 * data.computeShare);
  return { ...o, seconds: Math.max(memory, compute), memory: memory >= compute };
}
function row(body, name, of, total, inner) {
  const sum = key => of.reduce((s, o) => s + o[key], 0), seconds = sum("seconds");
  const r = body.insertRow();
  r.className = inner ? "inner" : "group";
  cell(r, name); cell(r, inner && of[0].bits ? of[0].bits.toFixed(2) : "");
  cell(r, (sum("bytes") / 1e6).toFixed(3)); cell(r, (sum("flops") / 1e6).toFixed(1)); cell(r, (seconds * 1e3).toFixed(4));
  const bar = document.createElement("span");
  bar.className = "bar" + (of.filter(o => o.memory).length * 2 >= of.length ? " memory" : "");
  bar.style.width = 100 * seconds / total + "%";
  cell(r, "").append(bar);
  return r;
}
function show() {
  const chip = data.chips.find(c => c.name === pick("chip")), by = pick("by");
  const all = data.steps[pick("step")].map(o => timed(o, chip)), groups = new Map();
  for (const o of all) groups.set(o[by], [...(groups.get(o[by]) || []), o]);
  const total = all.reduce((s, o) => s + o.seconds, 0), body = document.querySelector("tbody");
  body.replaceChildren();
  for (const [name, of] of groups) {
    row(body, (by === "layer" && name !== "ends" ? "layer " : "") + name, of, total, false).onclick = () => {
      open.has(name) ? open.delete(name) : open.add(name); show();
    };
    if (open.has(name)) for (const o of of) row(body, o.name, [o], total, true);
  }
  document.getElementById("total").textContent = (total * 1e3).toFixed(3) + " ms";
}
for (const id of ["chip", "step", "by"]) document.getElementById(id).onchange = () => { open.clear(); show() };
show();
"""


def latency_page(title: str, steps: Mapping[str, Sequence[Operation]]) -> str:
    """HTML about the operations of steps, by what a step is called."""
    data = {
        "bandwidthShare": BANDWIDTH_SHARE,
        "computeShare": COMPUTE_SHARE,
        "chips": [{"name": c.name, "bandwidth": c.gigabytes_per_s, "tops": c.float16_tops} for c in CHIPS],
        "steps": {
            step: [
                {
                    "name": o.name,
                    "layer": o.layer,
                    "kind": o.kind,
                    "bits": o.bits,
                    "bytes": o.nbytes,
                    "flops": o.flops,
                }
                for o in of
            ]
            for step, of in steps.items()
        },
    }
    chips = _options([chip.name for chip in CHIPS])
    # In a script element, only "</" could end it.
    packed = json.dumps(data).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>Estimates, measured on no device: of each operation the longer of its memory's time and its arithmetic's, at
{BANDWIDTH_SHARE:.0%} of the bandwidth and {COMPUTE_SHARE:.0%} of the operations a second that are published of a chip. What it takes
to start an operation is not counted: small models take longer.</p>
<p><select id="chip">{chips}</select><select id="step">{_options(list(steps))}</select>
by <select id="by"><option>kind</option><option>layer</option></select> in all <b id="total"></b></p>
<table><thead><tr><th>operation (click)</th><th>bits/weight</th><th>MB</th><th>MFLOP</th><th>ms</th>
<th><span class="bar memory" style="width:1rem"></span> memory <span class="bar" style="width:1rem"></span> arithmetic</th></tr>
</thead><tbody></tbody></table>
<script type="application/json" id="data">{packed}</script>
<script>{_SCRIPT}</script>
</html>
"""


def _options(names: Sequence[str]) -> str:
    return "".join(f"<option>{html.escape(name)}</option>" for name in names)
