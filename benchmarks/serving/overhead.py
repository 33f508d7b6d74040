"""What a step costs beside the model: gRPC, the scheduler and the engine, as a share of a step."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.serving.contenders import Server, free_port, grpc_server
from benchmarks.serving.load import Prompt

_SAMPLE = re.compile(r"^pippin:step_time_seconds_(sum|count)\S* (\S+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a load."""

    count: int
    model_s: float  # of all of them, in the model
    wall_s: float  # of the load
    cpu_s: float = 0.0  # of the server's process

    @property
    def step_s(self) -> float:
        """One step, with all that is around it."""
        return self.wall_s / self.count


class StepCounter:
    """Reads a server's steps from its metrics."""

    def __init__(self, metrics_port: int, server: Server):
        self._url, self._server = f"http://127.0.0.1:{metrics_port}/metrics", server
        self._before = self._now()

    def since(self) -> Steps:
        """The steps since this was made, or since this was called last."""
        before, self._before = self._before, self._now()
        count, model_s, wall_s, cpu_s = (b - a for a, b in zip(before, self._before, strict=True))
        return Steps(int(count), model_s, wall_s, cpu_s)

    def _now(self) -> tuple[float, float, float, float]:
        with urllib.request.urlopen(self._url, timeout=10) as answer:
            found = dict(_SAMPLE.findall(answer.read().decode()))
        at = time.monotonic()
        return float(found["count"]), float(found["sum"]), at, self._server.process.cpu_s()


def idle_steps(
    prompts: Iterator[Prompt], streams: Sequence[int], max_tokens: int, log: Path
) -> dict[int, Steps]:
    """For each number of streams, the steps of our server without a model."""
    port, metrics_port = free_port(), free_port()
    module = [sys.executable, "-P", "-m", "benchmarks.serving.idle_server"]
    command = [*module, "--port", str(port), "--metrics-port", str(metrics_port)]
    server = grpc_server(command, log, port)
    try:
        found = {}
        for count in [max(streams), *streams]:  # the first one warms up
            counter = StepCounter(metrics_port, server)
            server.closed_loop(count, list(itertools.islice(prompts, max(8, 2 * count))), max_tokens)
            found[count] = counter.since()
        return {count: found[count] for count in streams}
    finally:
        server.stop()
