import argparse
from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import parse_target
from pippin.train.cluster.launch_spec import LaunchSpec, parse_duration
from pippin.train.cluster.options import add_options, job_arguments, launch_spec


def spec(**fields: Any) -> LaunchSpec:
    return LaunchSpec(**({"name": "job", "arguments": (), "out": "/runs/job"} | fields))


@pytest.mark.parametrize(
    ("target", "hosts", "devices"),
    [
        ("tpu-v5p-512", 64, 4),
        ("tpu-v5p-8", 1, 4),
        ("tpu-v5e-256", 64, 4),
        ("tpu-v5e-8", 1, 8),
        ("tpu-v5e-1", 1, 1),
        ("tpu-v6e-256x2", 128, 4),
        ("gpu-h100-256", 32, 8),
        ("gpu-h100-2", 1, 2),
    ],
)
def test_a_target_is_so_many_hosts_of_so_many_devices(target: str, hosts: int, devices: int) -> None:
    job = spec(target=parse_target(target))
    assert (job.num_hosts, job.devices_per_host) == (hosts, devices)


def test_slices_of_tpus_are_whole() -> None:
    job = spec(target=parse_target("tpu-v6e-256x2"))
    assert (job.num_slices, job.topology) == (2, "16x16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "My_Job"}, "the job's name is 'My_Job'"),
        ({"env": {"A-B": "1"}}, "--env got the name 'A-B'"),
        ({"max_restarts": -1}, "must not be negative"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"time_limit_s": 60}, "leaves no time to train"),
    ],
)
def test_a_field_that_no_engine_takes_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(**fields)


def test_gpus_that_fill_no_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match="gpu-h100-12 is 12 GPUs, and hosts have 8"):
        _ = spec(target=parse_target("gpu-h100-12")).num_hosts


def test_durations() -> None:
    assert [parse_duration(t) for t in ("45s", "90m", "12h", "7d")] == [45, 5400, 43200, 604800]
    with pytest.raises(ConfigError, match="--time-limit got '1:30'"):
        parse_duration("1:30")


def test_a_process_gets_the_arguments_that_say_what_it_trains() -> None:
    argv = [
        "--recipe",
        "r",
        "--backend",
        "slurm",
        "-n",
        "4",
        "--set",
        "a=1",
        "--env",
        "K=V",
        "--dry-run",
        "--queue",
        "q",
        "--steps",
        "5",
    ]
    assert job_arguments(argv) == ["--recipe", "r", "--set", "a=1", "--steps", "5"]


@pytest.mark.parametrize("out", [["--out", "there"], ["--out=there"], []])
def test_the_directory_of_the_run_is_given_in_full(out: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(["--backend", "jobset", "--env", "A=b=c"])
    job = launch_spec(args, "llama2_7b", Path("/here/there"), ["--recipe", "llama2_7b", *out])
    assert job.arguments == ("--recipe", "llama2_7b", "--out", "/here/there")
    assert (job.name, dict(job.env), job.max_restarts) == ("llama2-7b", {"A": "b=c"}, 3)


def test_a_target_and_a_number_of_processes_contradict_each_other() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(["-n", "2", "--target", "tpu-v5p-8"])
    with pytest.raises(ConfigError, match="Leave out one of them"):
        launch_spec(args, "r", Path("/r"), [])
