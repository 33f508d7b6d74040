"""Loads on a server of ours that computes nothing: what the benchmark does, at a size of seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.serving.answers import Ending, Slo, figures
from benchmarks.serving.contenders import Process, Server, free_port, grpc_server
from benchmarks.serving.load import poisson
from benchmarks.serving.overhead import StepCounter, idle_steps
from benchmarks.serving.peers import PeerError, Places, missing

_MODULE = [sys.executable, "-P", "-m", "benchmarks.serving.idle_server"]


def _wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def _prompts() -> Iterator[list[int]]:
    return iter([[i + 1] * 32 for i in range(1000)])


@pytest.fixture
def metrics_port() -> int:
    return free_port()


@pytest.fixture
def server(tmp_path: Path, metrics_port: int) -> Iterator[Server]:
    port = free_port()
    flags = [
        "--port",
        str(port),
        "--metrics-port",
        str(metrics_port),
        "--max-requests",
        "4",
        "--max-waiting",
        "2",
    ]
    started = grpc_server([*_MODULE, *flags], tmp_path / "log", port)
    yield started
    started.stop()


def test_a_server_is_measured_in_closed_and_in_open_loops(server: Server, metrics_port: int) -> None:
    prompts = _prompts()
    counter = StepCounter(metrics_port, server)
    answers = server.closed_loop(2, [next(prompts) for _ in range(4)], 8)
    assert [a.ending for a in answers] == [Ending.WHOLE] * 4
    steps = counter.since()
    assert steps.count >= 16 and 0.005 * steps.count < steps.model_s < steps.wall_s

    # Four at a time take 8 steps of 5 ms: 100 a second at most, and few may wait.
    arrivals = poisson(400.0, 0.5, seed=0)
    answers = server.open_loop(arrivals, [next(prompts) for _ in arrivals], 8, 5.0)
    found = figures(answers, (0.0, 0.5), Slo(1.0, 0.1))
    assert len(answers) == len(arrivals)
    assert 0 < found.shed < 1 and found.unfinished == 0 and found.goodput_per_s > 0
    assert server.peak_bytes() > 10 << 20


def test_the_work_beside_the_model_is_counted_for_each_number_of_streams(tmp_path: Path) -> None:
    found = idle_steps(_prompts(), [1, 4], 8, tmp_path / "log")
    assert list(found) == [1, 4]
    assert all(0 < steps.cpu_s < 10 and steps.count > 0 for steps in found.values())


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no-such-flag"):
        grpc_server([*_MODULE, "--no-such-flag"], tmp_path / "log", free_port())


def test_a_process_that_is_paused_computes_nothing_and_can_be_stopped(tmp_path: Path) -> None:
    process = Process(["sh", "-c", "sh -c 'echo $$; while :; do :; done' & wait"], tmp_path / "log")
    _wait_until(lambda: (tmp_path / "log").read_text().endswith("\n"))
    child = psutil.Process(int((tmp_path / "log").read_text()))
    process.pause()
    _wait_until(lambda: child.status() == psutil.STATUS_STOPPED)
    before = child.cpu_times().user
    time.sleep(0.3)
    assert child.cpu_times().user == before
    process.resume()
    _wait_until(lambda: child.cpu_times().user > before)
    process.pause()
    process.stop()
    _wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_process_is_stopped_with_its_children(tmp_path: Path) -> None:
    process = Process(["sh", "-c", "sleep 600 & wait"], tmp_path / "log")
    process.stop()
    with pytest.raises(PeerError):
        process.require_alive()


def test_a_peer_that_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Places(tmp_path)
    monkeypatch.delenv("PIPPIN_PEERS_PYTHON", raising=False)
    for name in ("llama", "vllm"):
        assert f"bazel run //benchmarks:install_peers -- {name}" in str(missing(name, at))
    assert missing("hf", at) is not None
    at.llama_server.parent.mkdir()
    at.gguf.parent.mkdir(parents=True)
    at.llama_server.touch()
    at.gguf.touch()
    assert missing("llama", at) is None
