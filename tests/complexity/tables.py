"""The tables of the report: rows for a page, and text for a terminal."""

from __future__ import annotations

from tests.complexity.experiment import MAX_MODIFIER_LINES, FeatureResult, Results
from tests.complexity.paper import SYSTEMS, Estimate

PAPER_HEAD = ("system", "RoPE", "lines", "MoE", "lines")


def paper_rows(results: Results) -> list[tuple[str, ...]]:
    """The paper's table 2 and our row: system, and order and lines for RoPE and for MoE."""

    def cells(estimate: Estimate | None) -> tuple[str, str]:
        return ("N/A", "N/A") if estimate is None else (estimate.order, f"{estimate.lines:,}")

    rope, moe = (_named(results, name) for name in ("RoPE", "MoE"))
    ours = ("pippin, measured", _order(rope), f"{rope.change.total:,}", _order(moe), f"{moe.change.total:,}")
    return [*((s.name, *cells(s.rope), *cells(s.moe)) for s in SYSTEMS), ours]


def paper_table(results: Results) -> str:
    """The paper's table with our row, as text."""
    *paper, ours = _columns([PAPER_HEAD, *paper_rows(results)])
    return "\n".join(
        [
            "Lines of existing modules that change, 20 model variants x 10 attention variants.",
            "The paper's rows are its estimates (arXiv:2507.05411, table 2), ours is measured.",
            "",
            *paper,
            "-" * len(ours),
            ours,
        ]
    )


FEATURE_HEAD = (
    "feature",
    "lines changed",
    "functions changed",
    "modifier lines",
    "composed",
    "built",
    "run",
    "lines that name it",
    "new axes",
    "own lines",
)


def feature_rows(results: Results) -> list[tuple[str, ...]]:
    """What each feature took: the cells of `FEATURE_HEAD`."""
    return [
        (
            f.name + (" (a user's)" if f.from_user else ""),
            str(f.change.total),
            str(len(f.change.functions)),
            str(len(f.modifier)),
            str(f.composed),
            str(f.built),
            str(f.ran),
            str(sum(f.mentions.values())),
            ", ".join(f.new_axes) or "none",
            str(f.own_lines),
        )
        for f in results.features
    ]


def feature_table(results: Results) -> str:
    """What each feature took, as text."""
    watched = (
        f"Watched: {results.files} files of pippin.core and pippin.layers with {results.lines:,} lines, and "
        f"{results.functions:,} functions and classes in memory. Targets: 0 changed, "
        f"modifiers of {MAX_MODIFIER_LINES} lines or fewer."
    )
    return "\n".join([watched, "", *_columns([FEATURE_HEAD, *feature_rows(results)])])


def sweep_table(results: Results) -> str:
    """Lines changed and the time that a modifier takes, by the number of random configs."""
    head = ("N configs", *(text for f in results.features for text in (f.name, "s")))
    rows = [
        (
            f"{points[0].count:,}",
            *(text for p in points for text in (str(p.changed_lines), f"{p.seconds:.3f}")),
        )
        for points in zip(*(f.sweep for f in results.features), strict=True)
    ]
    replaced = ", ".join(f"{f.sweep[-1].replaced:,} by {f.name}" for f in results.features)
    return "\n".join(
        [
            "Lines changed for N random compositions, and seconds for the modifier to go through all N.",
            f"Components replaced at the largest N: {replaced}.",
            "",
            *_columns([head, *rows]),
        ]
    )


def _order(feature: FeatureResult) -> str:
    """O(1) where the lines changed are the same at every N."""
    return "O(1)" if len({point.changed_lines for point in feature.sweep}) == 1 else "grows"


def _named(results: Results, name: str) -> FeatureResult:
    return next(f for f in results.features if f.name == name)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
