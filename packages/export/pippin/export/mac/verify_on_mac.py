"""Runs an exported package on a Mac: its logits against the recorded ones on each compute unit, and how long it takes.

    pip install coremltools numpy
    python verify_on_mac.py            # beside golden.npz, in the folder X of X.mlpackage; macOS 15 or later

It prints what each compute unit computed, of the model and of each adapter that was recorded, and how long it took; it exits
with 1 where a unit fails, cannot load the package, or is further off than --tolerance, or than states
may be. This file was written without a Mac, and has been run only against an interpreter that stands in for Core ML.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# The logits were recorded without rounding in between. A device that rounds after every operation is off by so many
# units of the last place of float16 at the largest logit, or by 2e-2 where logits are small.
UNITS_OF_LAST_PLACE = 8
LEAST_TOLERANCE = 2e-2
# Of the sum of magnitudes of a state: as if each of its numbers were off by as many units as a logit may be, all the same
# way. Rounding mostly cancels (4e-5 in float16 of a tiny model, all told); states that the functions do not share lack
# what one of them wrote (5e-3 there without the last 3 tokens of 27, 0.9 without the prompt).
STATE_TOLERANCE = UNITS_OF_LAST_PLACE * 2.0**-11
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
PREFILL, DECODE = "prefill", "decode"
ADAPTER_HEADER_BYTES = 64  # of the file of an adapter: whose it is


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
    """What one compute unit made of one recording."""

    unit: str
    adapter: str  # "": the model without any
    max_error: float = float("nan")
    tokens_equal: int = 0
    calls: int = 0
    state_error: float = float("nan")  # of the sum of magnitudes, relative
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long one compute unit takes."""

    unit: str
    load_s: float  # both functions; the first time on a machine, it also compiles for the unit
    calls_ms: Mapping[str, Sequence[float]]  # function -> the time of each call


def recording(path: Path, adapters: Path) -> dict[str, np.ndarray]:
    """What was recorded in a file, with the numbers of its adapter as the package takes them.

    Raises:
        ValueError: it is no recording, or the file of its adapter is absent or another.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            golden = dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as e:
        raise ValueError(
            f"{path} is no recording: {e}. Record it again with pippin's `verify --record`"
        ) from e
    golden["adapter_values"] = np.zeros(int(golden["adapter"][0]), np.float16)
    if name := adapter_of(golden):
        golden["adapter_values"] = adapter_values(
            adapters / f"{name}.bin", golden["adapter_values"].size, path
        )
    return golden


def adapter_values(file: Path, count: int, recorded: Path) -> np.ndarray:
    """The numbers of an adapter that something was recorded with; raises ValueError if the file is not the same."""
    remedy = f"Put back the adapter that {recorded.name} was recorded with, or remove {recorded.name}"
    try:
        data = file.read_bytes()
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}. {remedy}") from e
    if len(data) != (expected := ADAPTER_HEADER_BYTES + 2 * count):
        raise ValueError(f"{file} has {len(data)} bytes, not {expected}. {remedy}")
    return np.frombuffer(data, "<f2", offset=ADAPTER_HEADER_BYTES)


def adapter_of(golden: Mapping[str, np.ndarray]) -> str:
    """The name of the adapter that a recording is of; empty for none."""
    return str(golden["adapter_name"][0]) if "adapter_name" in golden else ""


def calls(golden: Mapping[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray], int, np.ndarray]]:
    """Of each recorded call its function, its inputs, how many tokens are no padding, and the last logits."""
    for i, function in enumerate(golden["functions"]):
        inputs = {
            "inputIds": golden[f"ids_{i}"],
            "position": golden["position"][i : i + 1],
            "causalMask": golden[f"mask_{i}"],
        }
        if golden["adapter_values"].size:
            inputs["adapter"] = golden["adapter_values"]
        yield str(function), inputs, int(golden["tokens"][i]), golden[f"logits_{i}"]


def run_unit(
    recordings: Sequence[Mapping[str, np.ndarray]], load: Loader, unit: str, repeats: int
) -> tuple[list[Result], Latency | None]:
    """Runs all recorded calls on one compute unit, and then some again for their time."""
    results: list[Result] = []
    try:
        began = time.perf_counter()
        models = {name: load(name, unit) for name in (PREFILL, DECODE)}
        load_s = time.perf_counter() - began
        for golden in recordings:
            results.append(compared(golden, models, unit))
        times = {name: times_ms(recordings[0], models, name, repeats) for name in (PREFILL, DECODE)}
    except Exception as e:  # noqa: BLE001  a unit that cannot run the package is a result, and the others are tried
        adapter = adapter_of(recordings[min(len(results), len(recordings) - 1)])
        problem = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        return [*results, Result(unit, adapter, problem=problem)], None
    return results, Latency(unit, load_s, times)


def compared(golden: Mapping[str, np.ndarray], models: Mapping[str, Model], unit: str) -> Result:
    """Runs a recording, and holds what comes out against it. One state serves both functions, as in an app."""
    state = models[DECODE].make_state()
    error, equal, count = 0.0, 0, 0
    for function, inputs, tokens, want in calls(golden):
        # A copy: coremltools changes the dict that it is given.
        logits = np.asarray(models[function].predict(dict(inputs), state=state)["logits"])[0, tokens - 1]
        difference = np.abs(logits.astype(np.float64) - want.astype(np.float64))
        error = max(error, float("inf") if np.isnan(difference).any() else float(difference.max()))
        equal += int(logits.argmax() == want.argmax())
        count += 1
    return Result(unit, adapter_of(golden), error, equal, count, state_error(golden, state))


def default_tolerance(recordings: Sequence[Mapping[str, np.ndarray]]) -> float:
    """What an error of a logit must be below."""
    largest = max(float(np.abs(want).max()) for golden in recordings for _, _, _, want in calls(golden))
    return max(LEAST_TOLERANCE, UNITS_OF_LAST_PLACE * float(np.spacing(np.float16(largest))))


def state_error(golden: Mapping[str, np.ndarray], state: Any) -> float:
    """How far the states are off, as the sum of their magnitudes tells: relative, of the worst one."""
    worst = 0.0
    for name, want in zip(golden["states"], golden["state_magnitudes"], strict=True):
        total = float(np.abs(np.asarray(state.read_state(str(name)), np.float64)).sum())
        error = abs(total - float(want)) / max(float(want), 1e-9)
        worst = max(worst, float("inf") if np.isnan(error) else error)
    return worst


def times_ms(
    golden: Mapping[str, np.ndarray], models: Mapping[str, Model], function: str, repeats: int
) -> list[float]:
    """The times of calls, after two to warm up. Shapes are fixed: a call takes as long wherever in the text it is."""
    inputs = next(given for name, given, _, _ in calls(golden) if name == function)
    state = models[DECODE].make_state()
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        models[function].predict(dict(inputs), state=state)
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return times


def result_table(results: Sequence[Result], tolerance: float) -> str:
    """What was computed, as lines."""
    rows: list[tuple[str, ...]] = [
        ("compute unit", "adapter", "max error", "greedy tokens", "states off", "")
    ]
    for r in results:
        numbers = (f"{r.max_error:.2e}", f"{r.tokens_equal} of {r.calls}", f"{r.state_error:.1e}")
        verdict = f"FAILED: {r.problem}" if r.problem else "ok" if passed(r, tolerance) else "FAILED"
        rows.append((r.unit, r.adapter or "none", *(("-",) * 3 if r.problem else numbers), verdict))
    return aligned(rows)


def latency_table(latencies: Sequence[Latency], prefill_tokens: int) -> str:
    """How long it took, as lines: medians and 99th percentiles in ms, and tokens a second by the medians."""
    rows: list[tuple[str, ...]] = [
        (
            "compute unit",
            "load",
            f"prefill of {prefill_tokens}: P50",
            "P99",
            "tokens/s",
            "decode of 1: P50",
            "P99",
            "tokens/s",
        )
    ]
    for latency in latencies:
        cells = [latency.unit, f"{latency.load_s:.1f} s"]
        for function, tokens in ((PREFILL, prefill_tokens), (DECODE, 1)):
            p50, p99 = np.percentile(latency.calls_ms[function], (50, 99))
            cells += [f"{p50:.2f} ms", f"{p99:.2f} ms", f"{1e3 * tokens / p50:.1f}"]
        rows.append(tuple(cells))
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as lines whose columns are as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def passed(result: Result, tolerance: float) -> bool:
    """Whether a compute unit computes the model."""
    return (
        not result.problem
        and result.max_error < tolerance
        and result.tokens_equal == result.calls
        and result.state_error < STATE_TOLERANCE  # not where it is no number
    )


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
    parser.add_argument(
        "--golden",
        nargs="+",
        type=Path,
        help="recordings (default: golden.npz and golden_ADAPTER.npz beside this file)",
    )
    parser.add_argument(
        "--adapters", type=Path, default=folder / "adapters", help="the folder of their files"
    )
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--tolerance", type=float, help="of a logit (default: by how large logits are)")
    parser.add_argument(
        "--repeats", type=int, default=100, help="calls that are timed (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    paths = args.golden or [*folder.glob("golden.npz"), *sorted(folder.glob("golden_*.npz"))]
    if not paths:
        parser.error(f"{folder} has no golden.npz: pippin's `verify --record` writes it")
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; give how many calls are timed, 1 or more")
    try:
        recordings = [recording(path, args.adapters) for path in paths]
    except ValueError as e:
        parser.error(str(e))
    tolerance = default_tolerance(recordings) if args.tolerance is None else args.tolerance
    load = load or coreml_loader(args.package)
    results: list[Result] = []
    latencies: list[Latency] = []
    for unit in args.units:
        print(f"{unit} ...", file=sys.stderr)
        computed, latency = run_unit(recordings, load, unit, args.repeats)
        results += computed
        latencies += [] if latency is None else [latency]
    prefill = next(given for name, given, _, _ in calls(recordings[0]) if name == PREFILL)["inputIds"].shape[
        1
    ]
    print(result_table(results, tolerance))
    print(f"a logit may be off by {tolerance:.3g}, the sum of a state by {STATE_TOLERANCE:.1e} of it")
    if latencies:
        print()
        print(latency_table(latencies, prefill))
    return 0 if all(passed(r, tolerance) for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
