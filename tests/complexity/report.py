"""LoC-complexity, measured: `bazel run //tests/complexity:report`.

Integrates RoPE, MoE and two features that no package knows into 200 configs (20
model variants by 10 attention variants) and into up to 1,000 random ones, each by
its modifier, and counts the lines of existing modules that changed. `lines.py` has
the definitions, `features.py` what is required of every model.

Prints the paper's table with our row, and writes complexity.png, report.html and
results.json. The exit code is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.complexity.lines import use_copy


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    args = _parser().parse_args(argv)
    # Tiny models, each run a few times: no accelerator helps, and a busy one would only hinder.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        use_copy(Path(folder))
        # `bazel run` starts programs elsewhere; paths are relative to where the user typed.
        return _report(Path(os.environ.get("BUILD_WORKING_DIRECTORY", ".")) / args.out, args.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report", description="Counts the lines of existing modules that a new feature changes."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("complexity_report"), metavar="DIR", help="where the report goes"
    )
    parser.add_argument("--quick", action="store_true", help="build and run fewer of the models")
    return parser


def _report(out: Path, quick: bool) -> int:
    # Only now: these import the packages, and must find the copy.
    from tests.complexity.experiment import QUICK, Scale, measure
    from tests.complexity.page import write_page
    from tests.complexity.plot import write_plot
    from tests.complexity.tables import feature_table, paper_table, sweep_table

    results = measure(QUICK if quick else Scale(), lambda text: print(text, flush=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(dataclasses.asdict(results), indent=2) + "\n")
    write_plot(out / "complexity.png", results)
    write_page(out / "report.html", results, out / "complexity.png")
    print("\n" + "\n\n".join((paper_table(results), feature_table(results), sweep_table(results))))
    good = all(feature.meets_target for feature in results.features)
    print(f"\n{'All targets are met' if good else 'A TARGET IS MISSED'}, in {results.seconds:.0f} s.")
    print(f"Page: {out / 'report.html'}\nPlot: {out / 'complexity.png'}\nData: {out / 'results.json'}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
