"""`bazel run //benchmarks:serve`: our server beside Hugging Face's generate, SmolLM2-135M in float32, the same prompts.

Closed loop: so many streams, each of which sends its next prompt when the last one is answered. Ratios are of rounds in one
run: each contender answers one batch of all streams, then the next contender, again and again. Nothing else may run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from benchmarks.contest import spread
from pippin.layers.named_models import find_model
from pippin.serve.rpc.service import client_method
from pippin.v1 import inference_pb2 as pb

_MODEL = "smollm2-135m-instruct"
_PEER = Path(__file__).parent / "peers" / "hf_generate.py"
_INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name


@dataclasses.dataclass(frozen=True)
class Batch:
    """How a contender answered one prompt of each stream."""

    seconds: float
    first_s: float  # to the first token: of the median stream
    token_s: float  # between tokens: of the median stream
    tokens_per_s: float


class Ours:
    """Our server, in a process of its own, over gRPC."""

    def __init__(self, *flags: str):
        command = [
            sys.executable,
            "-P",
            "-m",
            "pippin.serve.server",
            "--model",
            _MODEL,
            "--port",
            "0",
            *flags,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().split()
        if not ready:
            raise RuntimeError("the server did not start: see above")
        self.address, self.ready_s = ready[1], float(ready[3])

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Batch:
        """Answers all prompts at once."""
        return asyncio.run(self._answer(prompts, max_tokens))

    def peak_bytes(self) -> int:
        """The most memory that the server had."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()

    async def _answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Batch:
        async with grpc.aio.insecure_channel(self.address) as channel:
            start = time.monotonic()
            times = await asyncio.gather(*(self._stream(channel, p, max_tokens) for p in prompts))
            seconds = time.monotonic() - start
        assert all(len(t) == max_tokens for t in times)
        first_s = statistics.median(t[0] - start for t in times)
        token_s = statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in times)
        return Batch(seconds, first_s, token_s, len(prompts) * max_tokens / seconds)

    async def _stream(self, channel: Any, prompt: Sequence[int], max_tokens: int) -> list[float]:
        """When each token came."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt), max_tokens=max_tokens, temperature=0.0, ignore_eos=True
        )
        times: list[float] = []
        async for event in client_method(channel, _INFERENCE["Generate"])(request):
            times += [time.monotonic()] * len(event.delta.token_ids)
        return times


class Peer:
    """Hugging Face's generate: a batch starts and ends as one."""

    def __init__(self):
        command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(_PEER), str(find_model(_MODEL))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._peak = 0
        self._read()

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Batch:
        """Answers all prompts at once."""
        assert self._process.stdin is not None
        asked = {"prompts": [list(p) for p in prompts], "max_tokens": max_tokens}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = self._read()
        self._peak = told["peak_bytes"]
        token_s = (told["seconds"] - told["first_s"]) / (max_tokens - 1)
        return Batch(told["seconds"], told["first_s"], token_s, len(prompts) * max_tokens / told["seconds"])

    def peak_bytes(self) -> int:
        """The most memory that it had."""
        return self._peak

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended: see above")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name, make in (
            ("pippin", Ours),
            ("pippin, no drafts", lambda: Ours("--max-drafts", "0")),
            ("Hugging Face", Peer),
        ):
            contenders[name] = contender = make()
            stack.callback(contender.stop)
        ours = contenders["pippin"]
        print(f"ready after {ours.ready_s:.1f} s")
        prompts = _prompts(ours.address, args.prompt_tokens)
        for streams in args.streams:
            results: dict[str, list[Batch]] = {name: [] for name in contenders}
            for _ in range(args.rounds):
                # The same prompts for all, and new ones in each round: nothing is in a cache of prefixes.
                batch = list(itertools.islice(prompts, streams))
                for name, contender in contenders.items():
                    results[name].append(contender.answer(batch, args.max_tokens))
            print(_table(streams, results), flush=True)
        for name, contender in contenders.items():
            print(f"{name}: {contender.peak_bytes() / 2**30:.2f} GiB at most")


def _prompts(address: str, length: int) -> Iterator[list[int]]:
    """Ids of pieces of the standard library's source, each once."""
    folder = Path(sysconfig.get_path("stdlib"))
    with grpc.insecure_channel(address) as channel:
        tokenize = client_method(channel, _INFERENCE["Tokenize"])
        for path in sorted(folder.glob("*.py")):
            text = path.read_text(errors="ignore")[:40_000]
            ids = list(tokenize(pb.TokenizeRequest(text=text)).token_ids)
            yield from (ids[i : i + length] for i in range(0, len(ids) - length + 1, length))


def _table(streams: int, results: dict[str, list[Batch]]) -> str:
    """A row a contender: medians of the rounds, and how many times as many tokens a second as the peer."""
    peer = results["Hugging Face"]
    lines = [f"\n{streams} streams        tokens/s   first token   between tokens   times Hugging Face"]
    for name, batches in results.items():
        ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(batches, peer, strict=True)]
        lines.append(
            f"{name:18} {statistics.median(b.tokens_per_s for b in batches):9.1f} "
            f"{1000 * statistics.median(b.first_s for b in batches):10.0f} ms "
            f"{1000 * statistics.median(b.token_s for b in batches):13.1f} ms   {spread(ratios)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
