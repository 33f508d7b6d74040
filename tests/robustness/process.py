"""A server as a process of its own, and what can be seen of it from outside."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from pippin.serve.rpc.service import client_method
from pippin.v1 import inference_pb2 as pb

_START_S, _WAIT_S = 120.0, 30.0
# Of the server, in the words of the metrics: a name and its labels, less the model's -> value.
Samples = Mapping[str, float]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = _WAIT_S) -> None:
    """Waits until it holds. Raises AssertionError after so long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class ServerProcess:
    """A server that runs."""

    process: subprocess.Popen[str]
    folder: pathlib.Path  # of its log and of the socket of Admin
    address: str
    url: str  # of HTTP, with the last slash

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def admin_address(self) -> str:
        return f"unix:{self.folder}/admin"

    @property
    def log(self) -> str:
        """All that it logged."""
        return (self.folder / "log").read_text(errors="replace")

    def get(self, path: str) -> bytes:
        """A page of the HTTP port, such as "load"."""
        with urllib.request.urlopen(self.url + path, timeout=_WAIT_S) as response:
            return response.read()

    def load(self) -> dict[str, Any]:
        """How busy it is."""
        return json.loads(self.get("load"))

    def metrics(self) -> Samples:
        """Its metrics, such as `request_success_total{stop}`."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("metrics").decode()):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k != "model_name"]
                name = sample.name.removeprefix("pippin:") + "".join(f"{{{v}}}" for v in labels)
                found[name] = sample.value
        return found

    def is_idle(self) -> bool:
        """It has nothing to do, and holds nothing of a request."""
        load = self.load()
        return not (load["running"] or load["waiting"] or load["waiting_tokens"] or load["cache_usage"])

    def memory_mib(self) -> float:
        """What it has in memory of its own, without files."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024

    def count(self, kind: str) -> int:
        """Of its threads ("task") or open files ("fd")."""
        return len(os.listdir(f"/proc/{self.pid}/{kind}"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def running(
    *flags: str,
    module: str = "pippin.serve.server",
    before: tuple[str, ...] = (),
    env: Mapping[str, str] = {},
) -> Iterator[ServerProcess]:
    """A server of a module, on ports that were free; `before`: arguments in front of the flags."""
    folder = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, for sockets
    ports = ["--port", "0", "--http-port", "0", "--admin-address", f"unix:{folder}/admin"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *before, *ports, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        )
    try:
        assert process.stdout is not None
        ready, http = process.stdout.readline().split(), process.stdout.readline().split()
        assert ready and ready[0] == "READY", (folder / "log").read_text()
        yield ServerProcess(process, folder, ready[1], http[1])
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        shutil.rmtree(folder)


def method_of(name: str, channel: grpc.Channel | grpc.aio.Channel) -> Any:
    """What calls a method of Inference or Admin, such as "Generate"."""
    services = pb.DESCRIPTOR.services_by_name.values()
    (method,) = [m for s in services for m in s.methods if m.name == name]
    return client_method(channel, method)


def generate(channel: grpc.Channel, text: str = "hello", **fields: Any) -> list[pb.GenerateResponse]:
    """All events of a call."""
    return list(method_of("Generate", channel)(pb.GenerateRequest(text=text, **fields), timeout=60))
