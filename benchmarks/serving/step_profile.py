"""Where a step's time goes: products of the weights, attention, the choice of tokens, and what no program computes."""

from __future__ import annotations

import gzip
import json
import random
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pippin.layers.named_models import find_model
from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import Sampling
from pippin.serve.engine.scheduler import Row

_STEPS = 5
_CONTEXT = 160  # tokens of each text: in the middle of an answer
_MODEL = "jit__step"  # the program of the model, as XLA names it; the others choose tokens
_NAMED = re.compile(r'%?([\w.\-]+) = [^\n]*?metadata=\{op_name="([^"]*)"')


def profile(model: str, streams: Sequence[int], chunk_tokens: int = 128) -> dict[str, dict[str, float]]:
    """For steps of so many answers, and for one of a prompt: part -> seconds.

    A part's share is its share of the time of all threads.
    """
    # JAX takes seconds to import.
    from pippin.serve.model import Sizes, open_served

    # Private: a benchmark looks into what it measures.
    runner: Any = open_served(find_model(model), Sizes(), QueueLimits()).engine._runner
    tokens = [random.Random(0).randrange(1000, 40_000) for _ in range(_CONTEXT + chunk_tokens)]
    steps = {
        f"{n} answer{'s' * (n > 1)}": [_answer(i, tokens, runner.limits.page_size) for i in range(n)]
        for n in streams
    }
    pages = range(-(-chunk_tokens // runner.limits.page_size))
    steps[f"{chunk_tokens} tokens of a prompt"] = [
        Row("prompt", tokens[:chunk_tokens], 0, pages, None, tokens, len(tokens), None)
    ]
    return {name: _measure(runner, rows) for name, rows in steps.items()}


def _answer(number: int, tokens: Sequence[int], page_size: int) -> Row:
    pages = _CONTEXT // page_size + 1
    history = [*tokens[:_CONTEXT], tokens[number]]
    held = range(number * pages, (number + 1) * pages)
    return Row(str(number), history[-1:], _CONTEXT, held, Sampling(temperature=0.0), history, 1, None)


def _measure(runner: Any, rows: Sequence[Row]) -> dict[str, float]:
    import jax

    ((_, shape),) = runner._split(rows)
    names = dict(_NAMED.findall(runner._programs[shape].as_text()))

    def run() -> None:
        runner.run(rows)
        jax.block_until_ready(runner._cache)

    run()
    start = time.monotonic()
    for _ in range(_STEPS):
        run()
    wall_s = (time.monotonic() - start) / _STEPS
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(_STEPS):
                run()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as text:
            return parts(json.load(text)["traceEvents"], names, wall_s, _STEPS)


def parts(
    events: Iterable[Mapping[str, Any]], names: Mapping[str, str], wall_s: float, steps: int
) -> dict[str, float]:
    """How many seconds of a step each part takes.

    Args:
        events: of a trace, with times in microseconds.
        names: instruction -> where it comes from in the program that was traced.
        wall_s: of a step, without the profiler.
        steps: how many were traced.
    """
    busy: dict[str, float] = {"products": 0.0, "attention": 0.0, "choice of tokens": 0.0, "other": 0.0}
    spans = []
    for event in events:
        told = event.get("args", {})
        if event.get("ph") != "X" or "hlo_op" not in told or told["hlo_op"].startswith("while"):
            continue  # a loop's time is that of what it computes
        busy[_part(told["hlo_module"], names.get(told["hlo_op"], ""))] += event["dur"]
        spans.append((event["ts"], event["ts"] + event["dur"]))
    computing_s = min(wall_s, _covered(spans) / 1e6 / steps)
    total = sum(busy.values()) or 1.0
    found = {part: computing_s * time / total for part, time in busy.items()}
    return {**found, "host": wall_s - computing_s}


def _part(module: str, path: str) -> str:
    if module != _MODEL:
        return "choice of tokens"
    if "/while/" in path:  # the only loop is attention's, over the pages
        return "attention"
    return "products" if path.endswith("dot_general") else "other"


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """For how long at least one of some spans lasts."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
