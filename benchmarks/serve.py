"""`bazel run //benchmarks:serve`: our server beside llama.cpp's, vLLM and Hugging Face's generate, with the same weights.

SmolLM2-135M in float32, the same prompts for all, no prompt twice. Closed loop: so many streams, each of which sends its
next prompt when the last one is answered, in turns of one run. Open loop: requests come at random times (Poisson), the
same times for all, at rates around and beyond what is served. Nothing else may run.

A peer that is not there is left out, and what brings it is told: `bazel run //benchmarks:install_peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from benchmarks.serving import contenders, overhead, peers
from benchmarks.serving.answers import Answer, Figures, Slo, figures
from benchmarks.serving.contenders import Contender, Server, free_port
from benchmarks.serving.load import Prompt, poisson
from benchmarks.serving.page import page
from benchmarks.serving.results import Results, Turn, markdown
from pippin.core.errors import PippinError
from pippin.serve.rpc.service import client_method
from pippin.v1 import inference_pb2 as pb

_OURS, _PLAIN = "pippin", "pippin, no drafts"
_PEERS = {"llama": "llama.cpp", "vllm": "vLLM", "hf": "Hugging Face"}
# The default rates, as shares of what our server answers in the closed loop with the most streams.
_RATES = (0.7, 1.0, 1.5, 3.0)
_LEAST_PROMPTS = 2  # of a round
_BUSY = 0.5  # the load of a machine with other work
_SETTLE_S = 0.5  # before a turn: what a contender does when it goes on


def main() -> int:
    args = _parse()
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if (busy := os.getloadavg()[0]) > _BUSY:
        print(
            f"warning: this machine has other work (its load is {busy:.1f}): figures will be worth little",
            file=sys.stderr,
        )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the servers, too
    try:
        results = Run(args).all()
    except PippinError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    tables = markdown(results)
    about = (
        f"SmolLM2-135M-Instruct in float32; {args.prompt_tokens} tokens in, {args.max_tokens} out, greedy. Goodput counts "
        f"requests whose first token comes within {results.slo.first_s:g} s and whose others take {results.slo.per_token_s:g} s "
        f"on average at most. Measured in {(time.monotonic() - began) / 60:.0f} min."
    )
    print(f"{about}\n\n{tables}")
    (args.out / "serve.html").write_text(page(results, tables, about))
    print(
        f"report    {(args.out / 'serve.html').absolute()}\nrequests  {(args.out / 'serve.jsonl').absolute()}"
    )
    return 0


class Run:
    """One run of the benchmark."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.results = args, Results(_OURS, Slo(args.slo_first_s, args.slo_token_s))
        self._at = peers.places()
        self._began = time.monotonic()

    def all(self) -> Results:
        """Measures everything that was asked for."""
        with open(self.args.out / "serve.jsonl", "w") as self._file, contextlib.ExitStack() as stack:
            others = self._start_peers(stack)
            with contextlib.ExitStack() as ours:
                plain = self._start(ours, _PLAIN, self._pippin("plain", "--max-drafts", "0"))
                metrics_port = free_port()
                make = self._pippin("closed", "--metrics-port", str(metrics_port))
                server = self._start(ours, _OURS, make)
                with _alone(server):
                    prompts = iter(list(_prompts(server, self.args.prompt_tokens)))
                    counter = overhead.StepCounter(metrics_port, server)
                for streams in self.args.streams:
                    self._closed_loop({_OURS: server, _PLAIN: plain, **others}, streams, prompts, counter)
                if self.args.streams:
                    log = self.args.out / "idle.log"
                    self._say("the work beside the model")
                    self.results.idle_steps = overhead.idle_steps(
                        prompts, self.args.streams, self.args.max_tokens, log
                    )
                self._note_peaks({_PLAIN: plain, _OURS: server})
            self._open_loops(stack, others, prompts)
            self._note_peaks(others)
        if self.args.profile:
            self._say("where a step's time goes")
            from benchmarks.serving.step_profile import profile

            self.results.parts = profile(peers.MODEL, [s for s in self.args.streams if s <= contenders.SLOTS])
        return self.results

    def _start_peers(self, stack: contextlib.ExitStack) -> dict[str, Contender]:
        started = {}
        makers: dict[str, Callable[[], Contender]] = {
            "llama": lambda: contenders.llama_server(self._at, self.args.out / "llama.log"),
            "vllm": lambda: contenders.vllm(self._at, self.args.out / "vllm.log"),
            "hf": contenders.HuggingFace,
        }
        for name in self.args.peers:
            if remedy := peers.missing(name, self._at):
                print(f"without {_PEERS[name]}: {remedy}", file=sys.stderr)
                continue
            started[_PEERS[name]] = self._start(stack, _PEERS[name], makers[name])
        return started

    def _pippin(self, log: str, *flags: str) -> Callable[[], Server]:
        return lambda: contenders.pippin(self.args.out / f"pippin_{log}.log", free_port(), flags)

    def _start[C: Contender](self, stack: contextlib.ExitStack, name: str, make: Callable[[], C]) -> C:
        self._say(f"starting {name}")
        contender = make()
        stack.callback(contender.stop)
        contender.pause()
        self.results.ready_s[name] = contender.ready_s
        return contender

    def _closed_loop(
        self, rivals: dict[str, Any], streams: int, prompts: Iterator[Prompt], counter: overhead.StepCounter
    ) -> None:
        """Rounds in which each contender answers the same prompts, which are new in each round."""
        args, steps = self.args, []
        for number in range(args.rounds):
            most = max(_LEAST_PROMPTS, streams * args.prompts_per_stream)
            batch = list(itertools.islice(prompts, most))
            for name, contender in rivals.items():
                with _alone(contender):
                    if name == _OURS:
                        counter.since()
                    answers = contender.closed_loop(streams, batch, args.max_tokens)
                    if name == _OURS:
                        steps.append(counter.since())
                seconds = max(a.ended_s for a in answers)
                self._add(Turn(name, streams, None, answers, self._figures(answers, (0, seconds))))
                self._say(f"{streams} streams, round {number + 1} of {args.rounds}: {self._last()}")
        count, model_s, wall_s, cpu_s = (sum(v) for v in zip(*map(dataclasses.astuple, steps), strict=True))
        self.results.steps[streams] = overhead.Steps(int(count), model_s, wall_s, cpu_s)

    def _open_loops(
        self, stack: contextlib.ExitStack, others: dict[str, Contender], prompts: Iterator[Prompt]
    ) -> None:
        args, slo = self.args, self.results.slo
        served = self._served_per_s()
        rates = args.rates if args.rates is not None else [round(served * share, 2) for share in _RATES]
        if not rates:
            return
        # The prompts of half of the first token's time; the other half is for steps that are longer than others.
        waiting = args.max_waiting_tokens or max(1, int(served * slo.first_s / 2)) * args.prompt_tokens
        rivals = {name: c for name, c in others.items() if c.takes_arrivals}
        bounded = self._pippin("open", "--max-waiting-tokens", str(waiting))
        name = f"{_OURS}, {waiting} tokens wait at most"
        rivals = {name: self._start(stack, name, bounded), **rivals}
        for number, rate in enumerate(rates):
            arrivals = poisson(rate, args.seconds, args.seed + number)
            batch = list(itertools.islice(prompts, len(arrivals)))
            # Whoever is not answered by then did not keep the SLO.
            until_s = args.seconds + slo.longest_s(args.max_tokens)
            for rival, contender in rivals.items():
                with _alone(contender):
                    answers = contender.open_loop(arrivals, batch, args.max_tokens, until_s)
                # Not the beginning, when all places are free.
                window = (args.seconds / 2, args.seconds)
                self._add(Turn(rival, None, rate, answers, self._figures(answers, window)))
                self._say(f"{rate:.2f} requests/s for {args.seconds:.0f} s: {self._last()}")
        self._note_peaks({name: rivals[name]})

    def _served_per_s(self) -> float:
        """Requests that our server answers in a second, by the closed loop with the most streams."""
        if not self.results.all_streams:
            return 1.0
        rounds = self.results.closed(self.results.all_streams[-1])[_OURS]
        return statistics.median(t.figures.tokens_per_s for t in rounds) / self.args.max_tokens

    def _figures(self, answers: Sequence[Answer], window: tuple[float, float]) -> Figures:
        return figures(answers, window, self.results.slo)

    def _note_peaks(self, of: dict[str, Any]) -> None:
        self.results.peak_bytes |= {name: contender.peak_bytes() for name, contender in of.items()}

    def _add(self, turn: Turn) -> None:
        for row in turn.rows(len(self.results.turns)):
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.results.turns.append(turn)

    def _last(self) -> str:
        turn = self.results.turns[-1]
        return f"{turn.contender}, {turn.figures.tokens_per_s:.1f} tokens/s, {turn.figures.shed:.0%} shed"

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:4.0f} s] {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(contender: Contender) -> Iterator[None]:
    """One contender runs, and those that wait for their turn do not: some of them compute while they wait."""
    contender.resume()
    time.sleep(_SETTLE_S)
    try:
        yield
    finally:
        contender.pause()


def _prompts(server: Server, length: int) -> Iterator[Prompt]:
    """Ids of pieces of the standard library's source, each once."""
    tokenize = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name["Tokenize"]
    with grpc.insecure_channel(server.address) as channel:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text = path.read_text(errors="ignore")[:40_000]
            ids = list(client_method(channel, tokenize)(pb.TokenizeRequest(text=text)).token_ids)
            yield from (ids[i : i + length] for i in range(0, len(ids) - length + 1, length))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", nargs="*", choices=list(_PEERS), default=list(_PEERS), help="all, unless some are named")
    add("--streams", nargs="*", type=int, default=[1, 8, 32], help="of the closed loops (%(default)s)")
    add("--rounds", type=int, default=3, help="of each closed loop (%(default)s)")
    add(
        "--prompts-per-stream",
        type=int,
        default=1,
        help="in a round, which has two prompts at least (%(default)s)",
    )
    add("--rates", nargs="*", type=float, help="requests a second of the open loops; none: no open loop")
    add("--seconds", type=float, default=30.0, help="for which they come (%(default)g)")
    add(
        "--max-waiting-tokens",
        type=int,
        help="our server's limit in the open loops; by the SLO unless it is given",
    )
    add("--slo-first-s", type=float, default=2.0, help="to the first token (%(default)g)")
    add("--slo-token-s", type=float, default=0.3, help="a token after it, on average (%(default)g)")
    add("--prompt-tokens", type=int, default=128)
    add("--max-tokens", type=int, default=64)
    add("--seed", type=int, default=0, help="of the times at which requests come")
    add("--no-profile", dest="profile", action="store_false", help="leave out where a step's time goes")
    add("--quick", action="store_true", help="a look in about two minutes, with 1 and 8 streams")
    add("--out", type=Path, default=Path("benchmark_serve"))
    args = parser.parse_args()
    if args.quick:
        args.streams, args.rounds, args.seconds = [1, 8], 1, 10.0
        args.rates = [0.5, 4.0] if args.rates is None else args.rates
    return args


if __name__ == "__main__":
    sys.exit(main())
