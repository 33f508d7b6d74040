"""Lines changed against the size of the system, as a picture."""

from __future__ import annotations

from pathlib import Path

from tests.complexity.experiment import Results
from tests.complexity.paper import MODEL_VARIANTS, SYSTEMS


def write_plot(path: Path, results: Results) -> None:
    """Draws one panel for RoPE and one for MoE: ours as measured, the paper's systems by its model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), dpi=120, sharey=True, layout="constrained")
    for axes, name in zip(panels, ("RoPE", "MoE"), strict=True):
        sweep = next(f.sweep for f in results.features if f.name == name)
        counts = [point.count for point in sweep]
        for i, system in enumerate(SYSTEMS):
            estimate = system.rope if name == "RoPE" else system.moe
            if estimate is None:
                continue
            # A wide line at zero, so that it shows beneath ours.
            wide = {} if estimate.lines else {"linewidth": 8, "alpha": 0.4}
            axes.plot(
                counts,
                [estimate.at(n) for n in counts],
                **{"linestyle": "--", "linewidth": 1.2, "color": f"C{i}", **wide},
                label=f"{system.name} (paper's model)",
            )
            axes.plot(MODEL_VARIANTS, estimate.lines, ".", color=f"C{i}", markersize=9)
        axes.plot(
            counts,
            [p.changed_lines for p in sweep],
            "ko-",
            linewidth=2,
            markersize=5,
            label="pippin, measured",
        )
        axes.set_title(name)
        axes.set_xlabel("N: model variants (paper) or composed configs (pippin)")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(-0.3, 1e6)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    panels[0].set_ylabel("lines of existing modules that change")
    figure.suptitle(
        "Dashed: not measured, but the paper's estimates at 20 x 10 (dots), scaled by its asymptotic order",
        fontsize=10,
    )
    figure.savefig(path)
    pyplot.close(figure)
