"""What holds after each test, whatever was done to the server."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import grpc

from pippin.v1 import inference_pb2 as pb
from tests.robustness.process import Samples, ServerProcess, generate, method_of, wait_for

# What the allocator keeps, and what caches hold that have an end.
_MEMORY_MIB = 96
_THREADS = 40  # the pools grow to their sizes, asyncio's own to 32
_FILES = 8
_BAD = re.compile(r"Traceback|never retrieved|was destroyed|unhandled|AssertionError", re.IGNORECASE)
_REASONS = ("stop", "length", "cancelled", "deadline", "constraint", "failed", "shutdown")

Answer = Sequence[tuple[int, float]]  # token, log-probability


def ended(before: Samples, after: Samples) -> dict[str, int]:
    """How many requests ended between two looks, by reason; those of none are left out."""
    name = "request_success_total{{{}}}"
    counts = {r: int(after[name.format(r)] - before[name.format(r)]) for r in _REASONS}
    return {reason: count for reason, count in counts.items() if count}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A server that has nothing to do, as it was before a test."""

    server: ServerProcess
    answers: Sequence[Answer]
    metrics: Samples
    memory_mib: float
    threads: int
    files: int
    log_size: int

    def check(self) -> dict[str, int]:
        """Asserts that the server is as it was. The result is how the requests since then ended, by reason."""
        server = self.server
        assert server.process.poll() is None, (
            f"it ended with {server.process.returncode}: {server.log[-3000:]}"
        )
        wait_for(server.is_idle, f"nothing to do and nothing held, {server.load()}")
        # What ended is counted a moment after its pages are free.
        wait_for(self._all_ended, "each request that was taken ends")
        by_reason = ended(self.metrics, server.metrics())
        assert server.get("health")
        assert answers_of(server) == self.answers, "the same questions, other answers"
        wait_for(server.is_idle, "the canary is done")
        wait_for(lambda: server.count("task") <= self.threads + _THREADS, f"{self.threads} threads")
        wait_for(lambda: server.count("fd") <= self.files + _FILES, f"{self.files} open files")
        memory_mib = server.memory_mib()
        assert memory_mib < self.memory_mib + _MEMORY_MIB, f"{self.memory_mib:.0f} -> {memory_mib:.0f} MiB"
        lines = [line for line in server.log[self.log_size :].splitlines() if _BAD.search(line)]
        assert not lines, server.log[self.log_size :][-5000:]
        return by_reason

    def _all_ended(self) -> bool:
        metrics = self.server.metrics()
        taken = metrics["num_requests_taken_total"] - self.metrics["num_requests_taken_total"]
        return taken == sum(ended(self.metrics, metrics).values())


def baseline(server: ServerProcess) -> Baseline:
    """The server as it is now."""
    wait_for(server.is_idle, "nothing to do")
    answers = answers_of(server)
    wait_for(server.is_idle, "the canary is done")
    return Baseline(
        server,
        answers,
        server.metrics(),
        server.memory_mib(),
        server.count("task"),
        server.count("fd"),
        len(server.log),
    )


def answers_of(server: ServerProcess) -> list[Answer]:
    """Canaries: a greedy and a drawn answer of the model, and a greedy one of each loaded adapter.

    Each token with its log-probability to the last bit.
    """
    greedy: dict[str, Any] = {"temperature": 0.0}
    asked = [greedy, {"temperature": 1.0, "seed": 7, "top_p": 0.9}]
    asked += [{**greedy, "adapter": name} for name in loaded(server)]
    with grpc.insecure_channel(server.address) as channel:
        return [
            answer_in(
                generate(channel, "the canary sings", max_tokens=24, logprobs=0, ignore_eos=True, **how)
            )
            for how in asked
        ]


def loaded(server: ServerProcess) -> list[str]:
    """The names of its adapters."""
    with grpc.insecure_channel(server.admin_address) as admin:
        listed = method_of("ListAdapters", admin)(pb.ListAdaptersRequest(), timeout=30)
    assert not any(adapter.num_requests for adapter in listed.adapters), listed
    return [adapter.name for adapter in listed.adapters]


def answer_in(events: Sequence[pb.GenerateResponse]) -> Answer:
    """The tokens of completion 0."""
    told = [p for e in events if e.HasField("delta") and e.delta.index == 0 for p in e.delta.logprobs]
    return [(one.token_id, one.logprob) for one in told]
