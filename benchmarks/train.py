"""`bazel run //benchmarks:train`: our training step beside Hugging Face's Llama on PyTorch, and compile time by depth.

Prints a table and writes train.html with charts. Ratios are of rounds in one
run: each contender does a few steps, then the next, again and again.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import html
import io
import json
import os
import statistics
import sys
from pathlib import Path

from benchmarks import protocol
from benchmarks.contest import Contender, Result, spread
from benchmarks.shapes import SHAPES, Shape, depth_shape

_PEER = Path(__file__).parent / "peers" / "torch_llama.py"
_DEPTHS = (2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long a contender's turn lasts, about")
    parser.add_argument("--depths", nargs="*", type=int, default=list(_DEPTHS))
    parser.add_argument("--out", type=Path, default=Path("benchmark_train"))
    args = parser.parse_args()
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    results = {name: _compare(SHAPES[name], args.rounds, args.seconds) for name in args.shapes}
    compile_s = {depth: _compile_seconds(depth) for depth in args.depths}
    text = _table(results) + _depth_table(compile_s)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.html").write_text(_page(text, results, compile_s))
    print(f"report  {args.out.absolute() / 'train.html'}")


def _ours(shape: Shape) -> list[str]:
    return [sys.executable, "-P", "-m", "benchmarks.pippin_contender", json.dumps(dataclasses.asdict(shape))]


def _peer(shape: Shape, mode: str) -> list[str]:
    python = os.environ["PIPPIN_PEERS_PYTHON"]
    folder = str(Path(protocol.__file__).parent)
    return [python, "-I", str(_PEER), folder, json.dumps(dataclasses.asdict(shape)), mode]


def _compare(shape: Shape, rounds: int, seconds: float) -> list[Result]:
    """Results of our step, torch.compile and eager PyTorch, in this order."""
    commands = {
        "pippin": _ours(shape),
        "torch.compile": _peer(shape, "compile"),
        "torch eager": _peer(shape, "eager"),
    }
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(_started(name, command)) for name, command in commands.items()]
        steps = {}
        for contender in contenders:
            contender.train(2, record=False)  # warm caches and allocators
            contender.train(1, record=True)
            steps[contender.name] = max(1, round(seconds / contender.result.seconds.pop()))
        for number in range(rounds):
            for contender in contenders:
                contender.train(steps[contender.name], record=True)
            print(f"  round {number + 1} of {rounds}", file=sys.stderr)
        for contender in contenders:
            contender.result.facts["tokens"] = shape.tokens
        return [contender.result for contender in contenders]


def _started(name: str, command: list[str]) -> Contender:
    print(f"starting {name}", file=sys.stderr)
    return Contender(name, command)


def _compile_seconds(depth: int) -> float:
    with _started(f"pippin, {depth} layers", _ours(depth_shape(depth))) as contender:
        return contender.result.facts["compile_s"]


def _table(results: dict[str, list[Result]]) -> str:
    lines = ["shape  contender       tokens/s   pippin is times as fast   peak memory   parameters"]
    for shape, contenders in results.items():
        ours = contenders[0]
        for result in contenders:
            rate = result.facts["tokens"] / statistics.median(result.seconds)
            ratio = "" if result is ours else spread(ours.ratios_to(result))
            lines.append(
                f"{shape:<7}{result.name:<14}{rate:>10,.0f}   {ratio:<23}   "
                f"{result.peak_bytes / 2**20:>7,.0f} MiB   {result.facts['params']:>10,}"
            )
        lines += [f"       {r.name}: {r.facts['version']}" for r in contenders]
    return "\n".join(lines) + "\n"


def _depth_table(compile_s: dict[int, float]) -> str:
    if not compile_s:
        return ""
    cells = "".join(f"{depth:>8}" for depth in compile_s)
    times = "".join(f"{seconds:>8.1f}" for seconds in compile_s.values())
    return f"\nlayers   {cells}\ncompile s{times}\n"


def _page(text: str, results: dict[str, list[Result]], compile_s: dict[int, float]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), dpi=110, layout="constrained")
    names = [r.name for r in next(iter(results.values()), [])]
    for i, name in enumerate(names):
        ratios = [
            statistics.median(shape[i].ratios_to(shape[names.index("torch.compile")]))
            for shape in results.values()
        ]
        left.bar([x + 0.25 * i for x in range(len(results))], ratios, width=0.24, label=name)
    left.axhline(1.2, color="gray", linestyle=":", label="goal: 1.2")
    left.set_xticks([x + 0.25 for x in range(len(results))], [f"shape {s}" for s in results])
    left.set_ylabel("speed, torch.compile = 1")
    left.legend()
    right.plot(list(compile_s), list(compile_s.values()), "o-")
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("layers")
    right.set_ylabel("seconds to compile the training step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    encoded = base64.b64encode(picture.getvalue()).decode()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>training benchmark</title>'
        f'<h1>Training step</h1><img alt="charts" src="data:image/png;base64,{encoded}">'
        f"<pre>{html.escape(text)}</pre></html>\n"
    )


if __name__ == "__main__":
    main()
