"""Estimates as text and as a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from pippin.train.hardware.estimate import Estimate

_GIB = 2**30


def table(estimates: Sequence[Estimate]) -> str:
    """One line a target."""
    rows: list[tuple[str, ...]] = [
        ("target", "devices", "mesh", "fits", "memory, GiB", "step, s", "MFU", "tokens/s", "compile, s")
    ]
    for e in estimates:
        memory = f"{e.used_bytes / _GIB:.1f} of {e.target.device.memory_bytes / _GIB:.1f}"
        least, most = e.step_s
        low, high = e.mfu
        timed = (
            (
                f"{least:.3g} to {most:.3g}",
                f"{low:.0%} to {high:.0%}",
                f"{e.tokens / most:,.0f} to {e.tokens / least:,.0f}",
            )
            if e.fits
            else ("", "", "")
        )
        fits = "yes" if e.fits else "NO"
        rows.append(
            (e.target.name, str(e.target.num_devices), _mesh(e), fits, memory, *timed, f"{e.compile_s:.0f}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def details(e: Estimate) -> str:
    """A paragraph on one target."""
    rule = e.applied.rule.accelerators if e.applied.rule else "none"
    lines = [f"{e.target.name}: {e.target.num_devices} devices, mesh {_mesh(e)}; mesh rule {rule}"]
    for name, changes in e.applied.changes:
        lines += [f"  {name}: {line}" for line in changes]
    lines += [
        "  memory a device: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in _parts(e).items())
        + f"; {_gib(e.used_bytes)} of {_gib(e.target.device.memory_bytes)}",
        f"  FLOPs of a step: {e.model_flops:.3g} of the model; executed: {e.executed.compiled:.3g} in matmuls, "
        + f"{e.executed.kernels:.3g} in kernels",
    ]
    lines += [f"  attention: {kernel}" for kernel in e.kernels]
    lines += [f"  not compiled: {e.left_out}"] if e.left_out else []
    if e.profile is None or not e.fits:
        return "\n".join([*lines, f"  IT DOES NOT FIT. {e.remedy()}"])
    source = "a bound by memory and matmuls" if e.target.device.gpu else "its own estimate"
    lines.append(
        f"  time: {e.compiled_s:.3g} s of what XLA compiled ({source}), {e.kernels_s:.3g} s of kernels (every block, "
        f"at the peak), {e.link_s:.3g} s of transfers (at full speed)"
    )
    crossing = [c for c in e.profile.collectives if c.over_network]
    if crossing:
        inside, outside = (
            ("a slice", "between slices") if e.target.num_slices > 1 else ("a node", "over the network")
        )
        sent, crossed = (sum(c.sent_bytes for c in some) for some in (e.profile.collectives, crossing))
        lines.append(
            f"  sent by each device: {(sent - crossed) / 1e9:.3g} GB inside {inside}, in "
            f"{e.link_s - e.profile.network_s:.3g} s; {crossed / 1e9:.3g} GB {outside}, in {e.profile.network_s:.3g} s"
        )
    lines.append(
        f"  memory read and written: {e.profile.moved_bytes / 1e12:.3g} TB by each device, less kernels"
    )
    for c in e.profile.collectives:
        lines.append(
            f"    {c.kind:<20} over {c.axes:<12} groups of {c.group_size:<5} {c.times:>6} times  "
            f"{c.sent_bytes / 1e9:>8.3g} GB sent by each device"
            + (
                ""
                if not c.over_network
                else ", between slices"
                if e.target.num_slices > 1
                else ", over the network"
            )
        )
    if e.profile.unknown_loops:
        lines.append(f"  {e.profile.unknown_loops} loops turn an unknown number of times: they count once")
    return "\n".join(lines)


def page(recipe: str, estimates: Sequence[Estimate]) -> str:
    """An HTML page with a chart of memory and of time for each target."""
    charts = "".join(
        f"<h2>{html.escape(e.target.name)}</h2><img alt='memory and time of a step on {html.escape(e.target.name)}' "
        f"src='data:image/png;base64,{_chart(e)}'><pre>{html.escape(details(e))}</pre>"
        for e in estimates
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(recipe)}</title><style>body{{font:16px system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}}"
        "pre{overflow-x:auto;background:#8881;padding:1rem}img{max-width:100%}</style>"
        f"<h1>{html.escape(recipe)}: a training step, by the compilers of its targets</h1>"
        f"<pre>{html.escape(table(estimates))}</pre>{charts}</html>\n"
    )


def _chart(e: Estimate) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, seconds) = pyplot.subplots(2, 1, figsize=(9, 3.2), dpi=100, layout="constrained")
    left = 0.0
    for name, size in _parts(e).items():
        memory.barh(0, size / _GIB, left=left, label=name)
        left += size / _GIB
    memory.axvline(e.target.device.memory_bytes / _GIB, color="black", linestyle=":", label="there is")
    memory.set(yticks=[], xlabel="GiB a device")
    memory.legend(ncols=5, fontsize=8)
    if e.fits:
        seconds.barh(1, e.compiled_s, label="what XLA compiled")
        seconds.barh(1, e.kernels_s, left=e.compiled_s, label="kernels")
        seconds.barh(0, e.link_s, label="transfers")
        ideal = e.model_flops / (e.target.num_devices * e.target.device.peak_flops)
        seconds.axvline(ideal, color="black", linestyle=":", label="the model's FLOPs at the peak")
        seconds.legend(ncols=4, fontsize=8)
    seconds.set(yticks=[], xlabel="seconds a step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    return base64.b64encode(picture.getvalue()).decode()


def _parts(e: Estimate) -> dict[str, float]:
    """What a device's memory holds, in bytes."""
    parts = {"parameters": e.parameter_bytes, "learner": e.learner_bytes, "temporaries": e.temporary_bytes}
    return parts | {"program": e.program_bytes} if e.fits else parts


def _mesh(e: Estimate) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in e.mesh.items() if size > 1) or "one device"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
