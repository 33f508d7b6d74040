"""Runs an exported package on a Mac: its logits against the recorded ones on each compute unit, and how long it takes.

    pip install coremltools numpy
    python verify_on_mac.py            # beside golden.npz, in the folder X of X.mlpackage; macOS 15 or later

It prints a table, and exits with 1 where a compute unit fails, cannot load the package, or is further off than
--tolerance. This file was written without a Mac, and has been run only against an interpreter that stands in for Core ML.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# The logits were recorded without rounding in between. A device that rounds after every operation is off by so many
# units of the last place of float16 at the largest logit, or by 2e-2 where logits are small.
UNITS_OF_LAST_PLACE = 8
LEAST_TOLERANCE = 2e-2
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
PREFILL, DECODE = "prefill", "decode"


class Model(Protocol):
    """What is used of coremltools.models.MLModel."""

    def make_state(self) -> Any:
        """Empty states."""
        ...

    def predict(self, data: dict[str, Any], state: Any = None) -> Mapping[str, Any]:
        """The outputs of one call."""
        ...


Loader = Callable[
    [str, str], Model
]  # function, compute unit -> model; no `type`, which older Pythons do not know


@dataclasses.dataclass(frozen=True)
class Result:
    """What one compute unit did."""

    unit: str
    max_error: float = float("nan")
    tokens_equal: int = 0
    calls: int = 0
    state_error: float = float("nan")  # of the sum of magnitudes, relative
    prefill_ms: float = float("nan")
    decode_ms: float = float("nan")
    problem: str = ""


def calls(golden: Mapping[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray], int, np.ndarray]]:
    """Of each recorded call its function, its inputs, how many tokens are no padding, and the last logits."""
    adapter = int(golden["adapter"][0])
    for i, function in enumerate(golden["functions"]):
        inputs = {
            "inputIds": golden[f"ids_{i}"],
            "position": golden["position"][i : i + 1],
            "causalMask": golden[f"mask_{i}"],
        }
        if adapter:
            inputs["adapter"] = np.zeros(adapter, np.float16)
        yield str(function), inputs, int(golden["tokens"][i]), golden[f"logits_{i}"]


def run_unit(golden: Mapping[str, np.ndarray], load: Loader, unit: str, repeats: int) -> Result:
    """Runs all recorded calls on one compute unit, and then some again for their time."""
    try:
        models = {name: load(name, unit) for name in (PREFILL, DECODE)}
        state = models[DECODE].make_state()
        error, equal, count = 0.0, 0, 0
        for function, inputs, tokens, want in calls(golden):
            # A copy: coremltools changes the dict that it is given.
            logits = np.asarray(models[function].predict(dict(inputs), state=state)["logits"])[0, tokens - 1]
            difference = np.abs(logits.astype(np.float64) - want.astype(np.float64))
            error = max(error, float("inf") if np.isnan(difference).any() else float(difference.max()))
            equal += int(logits.argmax() == want.argmax())
            count += 1
        off = state_error(golden, state)
        times = {name: latency_ms(golden, models, name, repeats) for name in (PREFILL, DECODE)}
    except Exception as e:  # noqa: BLE001  a unit that cannot run the package is a result, and the others are tried
        return Result(unit, problem=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    return Result(unit, error, equal, count, off, times[PREFILL], times[DECODE])


def default_tolerance(golden: Mapping[str, np.ndarray]) -> float:
    """What an error of a logit must be below."""
    largest = max(float(np.abs(want).max()) for _, _, _, want in calls(golden))
    return max(LEAST_TOLERANCE, UNITS_OF_LAST_PLACE * float(np.spacing(np.float16(largest))))


def state_error(golden: Mapping[str, np.ndarray], state: Any) -> float:
    """How far the states are off, as the sum of their magnitudes tells: relative, of the worst one."""
    worst = 0.0
    for name, want in zip(golden["states"], golden["state_magnitudes"], strict=True):
        total = float(np.abs(np.asarray(state.read_state(str(name)), np.float64)).sum())
        worst = max(worst, abs(total - float(want)) / max(float(want), 1e-9))
    return worst


def latency_ms(
    golden: Mapping[str, np.ndarray], models: Mapping[str, Model], function: str, repeats: int
) -> float:
    """The median time of a call, after two to warm up, in milliseconds."""
    inputs = next(given for name, given, _, _ in calls(golden) if name == function)
    state = models[DECODE].make_state()
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        models[function].predict(dict(inputs), state=state)
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def table(results: list[Result], golden: Mapping[str, np.ndarray], tolerance: float) -> str:
    """The results as lines."""
    prefill = next(given for name, given, _, _ in calls(golden) if name == PREFILL)["inputIds"].shape[1]
    rows: list[tuple[str, ...]] = [
        (
            "compute unit",
            "max error",
            "greedy tokens",
            "states off",
            f"prefill of {prefill}",
            "decode",
            "tokens/s",
            "",
        )
    ]
    for r in results:
        if r.problem:
            rows.append((r.unit, *["-"] * 6, f"FAILED: {r.problem}"))
            continue
        rows.append(
            (
                r.unit,
                f"{r.max_error:.2e}",
                f"{r.tokens_equal} of {r.calls}",
                f"{r.state_error:.1e}",
                f"{r.prefill_ms:.1f} ms",
                f"{r.decode_ms:.1f} ms",
                f"{1e3 / r.decode_ms:.1f}",
                "ok" if passed(r, tolerance) else "FAILED",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def passed(result: Result, tolerance: float) -> bool:
    """Whether a compute unit computes the model."""
    return not result.problem and result.max_error < tolerance and result.tokens_equal == result.calls


def coreml_loader(package: Path) -> Loader:
    """Loads functions of a package with coremltools, which needs macOS."""
    import coremltools as ct

    def load(function: str, unit: str) -> Model:
        return ct.models.MLModel(str(package), function_name=function, compute_units=ct.ComputeUnit[unit])

    return load


def main(argv: list[str] | None = None, load: Loader | None = None) -> int:
    """Runs the check; returns 0 if every compute unit passed, else 1."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, default=folder.with_name(f"{folder.name}.mlpackage"))
    parser.add_argument("--golden", type=Path, default=folder / "golden.npz")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--tolerance", type=float, help="of a logit (default: by how large logits are)")
    parser.add_argument("--repeats", type=int, default=20, help="calls that are timed (default: %(default)s)")
    args = parser.parse_args(argv)
    with np.load(args.golden, allow_pickle=False) as file:
        golden = dict(file)
    tolerance = default_tolerance(golden) if args.tolerance is None else args.tolerance
    load = load or coreml_loader(args.package)
    results = []
    for unit in args.units:
        print(f"{unit} ...", file=sys.stderr)
        results.append(run_unit(golden, load, unit, args.repeats))
    print(table(results, golden, tolerance))
    print(f"a logit may be off by {tolerance:.3g}")
    return 0 if all(passed(r, tolerance) for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
