"""The servers under load: ours and its peers, each in a process of its own, with the same weights in float32."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import psutil

from benchmarks.serving import load
from benchmarks.serving.answers import Answer, Ending
from benchmarks.serving.http_events import post
from benchmarks.serving.load import Client, Prompt, ShedError
from benchmarks.serving.peers import MODEL, PeerError, Places
from pippin.layers.named_models import find_model
from pippin.serve.rpc.service import client_method
from pippin.v1 import inference_pb2 as pb

SLOTS = 32  # requests that a server serves at a time
_CONTEXT = 256  # tokens of each, where memory is reserved for them
_READY_S = 300.0
_INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name
_HF_SCRIPT = Path(__file__).parent / "hf_generate.py"


class Contender(Protocol):
    """Who answers loads."""

    ready_s: float  # from its start to its first answer
    takes_arrivals: bool  # requests may come at any time

    def closed_loop(self, streams: int, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """See `load.closed_loop`."""
        ...

    def open_loop(
        self, arrivals: Sequence[float], prompts: Sequence[Prompt], max_tokens: int, until_s: float
    ) -> list[Answer]:
        """See `load.open_loop`. Nothing is left to do for the server when this returns."""
        ...

    def peak_bytes(self) -> int:
        """The most memory that each of its processes had, in all."""
        ...

    def pause(self) -> None:
        """Takes the cores from it, as nobody asks it anything: threads that wait for work use them too."""
        ...

    def resume(self) -> None:
        """Gives them back."""
        ...

    def stop(self) -> None:
        """Ends it."""
        ...


class Process:
    """A program whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None):
        self.log = log
        with open(log, "wb") as file:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **(env or {})}
            )

    def require_alive(self) -> None:
        """Raises PeerError with the end of its output, where it has ended."""
        if self._popen.poll() is not None:
            told = self.log.read_text(errors="replace")[-2000:]
            raise PeerError(f"{self._popen.args} ended with {self._popen.returncode}:\n{told}")  # pyright: ignore

    def peak_bytes(self) -> int:
        """The most memory that it and each of its children had, in all."""
        root = psutil.Process(self._popen.pid)
        return sum(_peak_bytes(p.pid) for p in [root, *root.children(recursive=True)])

    def pause(self) -> None:
        """See `Contender`."""
        _signal(self._popen.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """See `Contender`."""
        _signal(self._popen.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """What it computed so far."""
        times = psutil.Process(self._popen.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """Ends it and its children."""
        self.resume()  # or it would not hear of it
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self._popen.pid).children(recursive=True)
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(20)
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._popen.kill()
        self._popen.wait()


class Server:
    """A server that streams answers, over one connection or many."""

    takes_arrivals = True

    def __init__(
        self,
        process: Process,
        port: int,
        connect: Callable[[], contextlib.AbstractAsyncContextManager[Client]],
    ):
        self.process, self.address, self._connect = process, f"127.0.0.1:{port}", connect
        start = time.monotonic()
        self._wait()
        self.ready_s = time.monotonic() - start

    def closed_loop(self, streams: int, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """See `Contender`."""

        async def run() -> list[Answer]:
            async with self._connect() as client:
                return await load.closed_loop(client, streams, prompts, max_tokens)

        return asyncio.run(run())

    def open_loop(
        self, arrivals: Sequence[float], prompts: Sequence[Prompt], max_tokens: int, until_s: float
    ) -> list[Answer]:
        """See `Contender`."""

        async def run() -> list[Answer]:
            async with self._connect() as client:
                return await load.open_loop(client, arrivals, iter(prompts), max_tokens, until_s)

        answers = asyncio.run(run())
        self._wait()  # what was cancelled is given up by now, or in its way
        return answers

    def peak_bytes(self) -> int:
        """See `Contender`."""
        return self.process.peak_bytes()

    def pause(self) -> None:
        """See `Contender`."""
        self.process.pause()

    def resume(self) -> None:
        """See `Contender`."""
        self.process.resume()

    def stop(self) -> None:
        """See `Contender`."""
        self.process.stop()

    def _wait(self) -> None:
        """Waits until it answers a request as soon as it does where nothing else is to do."""
        until = time.monotonic() + _READY_S
        while time.monotonic() < until:
            self.process.require_alive()
            (answer,) = self.closed_loop(1, [[1, 2, 3]], 2)
            if answer.ending is Ending.WHOLE:
                return
            time.sleep(0.2)
        raise PeerError(f"{self.process.log}: no answer in {_READY_S:.0f} s")


@dataclasses.dataclass(frozen=True)
class _Grpc:
    """Our protocol."""

    channel: grpc.aio.Channel

    async def generate(self, prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int]]:
        """See `Client`."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt), max_tokens=max_tokens, temperature=0.0, ignore_eos=True
        )
        call = client_method(self.channel, _INFERENCE["Generate"])(request)
        try:
            async for event in call:
                if event.delta.token_ids:
                    yield event.delta.token_ids
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise ShedError from None
            raise RuntimeError(error.details()) from None
        finally:
            call.cancel()


@dataclasses.dataclass(frozen=True)
class _LlamaHttp:
    """llama.cpp's own protocol."""

    port: int

    async def generate(self, prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int]]:
        """See `Client`."""
        asked = {"prompt": list(prompt), "n_predict": max_tokens, "temperature": 0, "ignore_eos": True}
        asked |= {"stream": True, "return_tokens": True, "cache_prompt": False}
        async with contextlib.aclosing(post(self.port, "/completion", asked)) as events:
            async for event in events:
                yield event["tokens"]


@dataclasses.dataclass(frozen=True)
class _OpenAi:
    """The protocol of OpenAI's completions, with token ids."""

    port: int

    async def generate(self, prompt: Prompt, max_tokens: int) -> AsyncGenerator[Sequence[int]]:
        """See `Client`."""
        asked = {"model": MODEL, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        asked |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        async with contextlib.aclosing(post(self.port, "/v1/completions", asked)) as events:
            async for event in events:
                for choice in event["choices"]:
                    yield choice["token_ids"] or []


def grpc_server(command: Sequence[str], log: Path, port: int, env: Mapping[str, str] | None = None) -> Server:
    """A server of our protocol, started by a command."""

    @contextlib.asynccontextmanager
    async def connect() -> AsyncGenerator[_Grpc]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield _Grpc(channel)

    return Server(Process(command, log, env), port, connect)


def pippin(log: Path, port: int, flags: Sequence[str] = ()) -> Server:
    """Our server."""
    module = [sys.executable, "-P", "-m", "pippin.serve.server"]
    return grpc_server([*module, "--model", MODEL, "--port", str(port), *flags], log, port)


def llama_server(at: Places, log: Path) -> Server:
    """llama.cpp's server, with a slot for each request that is served at a time, and no cache of prompts."""
    port, threads = free_port(), str(os.cpu_count() or 1)
    command = [str(at.llama_server), "--model", str(at.gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * _CONTEXT), "--threads", threads]
    command += ["--no-cache-prompt", "--cache-ram", "0", "--ctx-checkpoints", "0", "--no-ui", "--offline"]
    return Server(Process(command, log), port, lambda: contextlib.nullcontext(_LlamaHttp(port)))


def vllm(at: Places, log: Path) -> Server:
    """vLLM on the CPU, without its cache of prefixes."""
    port = free_port()
    command = [str(at.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(at.hugging_face), "--served-model-name", MODEL]
    command += ["--dtype", "float32", "--max-num-seqs", str(SLOTS), "--max-model-len", "2048"]
    # Its check that memory is free counts the whole machine's; the cache is what the environment says.
    command += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.2"]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, as ours
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # else one is kept for its front end
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(at.folder / "vllm-cache"),  # of compiled programs
        "PYTHONPATH": "",
    }
    # As its documentation asks for.
    if faster := [str(path) for path in at.vllm_python.parents[1].glob("lib/libiomp5.so")]:
        env["LD_PRELOAD"] = ":".join(faster)
    return Server(Process(command, log, env), port, lambda: contextlib.nullcontext(_OpenAi(port)))


class HuggingFace:
    """Hugging Face's generate: a batch starts and ends as one."""

    takes_arrivals = False

    def __init__(self) -> None:
        start = time.monotonic()
        command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(_HF_SCRIPT), str(find_model(MODEL))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read()
        self.ready_s = time.monotonic() - start

    def closed_loop(self, streams: int, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """See `Contender`."""
        assert self._process.stdin is not None
        answers: list[Answer] = []
        start = time.monotonic()
        for i in range(0, len(prompts), streams):
            batch = [list(prompt) for prompt in prompts[i : i + streams]]
            self._process.stdin.write(json.dumps({"prompts": batch, "max_tokens": max_tokens}) + "\n")
            self._process.stdin.flush()
            began = time.monotonic() - start
            told = self._read()
            times = tuple(began + t for t in told["token_s"])
            answers += [Answer(began, times, Ending.WHOLE, times[-1], tuple(ids)) for ids in told["tokens"]]
        return answers

    def open_loop(
        self, arrivals: Sequence[float], prompts: Sequence[Prompt], max_tokens: int, until_s: float
    ) -> list[Answer]:
        """See `Contender`."""
        raise NotImplementedError("a batch starts and ends as one")

    def peak_bytes(self) -> int:
        """See `Contender`."""
        return _peak_bytes(self._process.pid)

    def pause(self) -> None:
        """See `Contender`."""
        _signal(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """See `Contender`."""
        _signal(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """See `Contender`."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{_HF_SCRIPT.name} ended with {self._process.wait()}")
        return json.loads(line)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _signal(pid: int, number: int) -> None:
    """Sends a signal to a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            process.send_signal(number)


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return sum(map(int, peaks)) * 1024
