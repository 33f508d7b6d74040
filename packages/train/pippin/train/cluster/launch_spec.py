"""What is submitted to a cluster: one description, which each backend renders as its engine wants it. No JAX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import Target

MODULE = "pippin.train.launch"  # what every process runs, with `arguments`

_NAME = re.compile(
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
)  # of a Kubernetes object, with room for what is appended
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_GPUS_PER_HOST, _CHIPS_PER_HOST = 8, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """A training job for a cluster.

    Raises:
        ConfigError: a field is not of the form that every engine takes.
    """

    name: str
    arguments: tuple[str, ...]  # launch's, such as ("--recipe", "llama2_7b")
    out: str  # the run's directory, as the processes see it; all machines share it
    target: Target | None = None  # None: CPUs
    num_processes: int = 1  # where there is no target: one process a host otherwise
    image: str = ""
    queue: str = ""
    namespace: str = "default"  # Kubernetes
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    volumes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # claim -> where it is mounted
    node_selector: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # in place of the backend's own
    max_restarts: int = 3  # where a process was lost; a preemption is not counted
    time_limit_s: int | None = None
    stop_grace_s: int = 300  # from the request to stop to the end: time to save

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"the job's name is {self.name!r}; it names objects of the cluster: at most 40 lower-case letters, digits "
                "and -, a letter first. Give --name."
            )
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(
                    f"--env got the name {name!r}. Write NAME=VALUE, with letters, digits and _."
                )
        for field in ("num_processes", "stop_grace_s"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}: it must be at least 1.")
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts is {self.max_restarts}: it must not be negative.")
        if self.time_limit_s is not None and self.time_limit_s <= self.stop_grace_s:
            raise ConfigError(
                f"--time-limit of {self.time_limit_s} s leaves no time to train: the last {self.stop_grace_s} s are kept for "
                "saving. Give it more."
            )

    @property
    def platform(self) -> str:
        """JAX's: "tpu", "gpu" or "cpu"."""
        return self.target.platform if self.target else "cpu"

    @property
    def num_slices(self) -> int:
        """Of TPUs; hosts of other kinds count as one slice."""
        return self.target.num_slices if self.target else 1

    @property
    def topology(self) -> str:
        """A TPU slice's, such as "4x8x8"."""
        assert self.target is not None
        return "x".join(map(str, self.target.torus()))

    @property
    def devices_per_host(self) -> int:
        """Accelerators of a host, all of which its one process drives; 0 for CPUs.

        Raises:
            ConfigError: the hosts would not be whole.
        """
        if self.target is None or self.platform == "cpu":
            return 0
        each = self.target.num_devices // self.num_slices
        if self.platform == "tpu":
            return each if each < _CHIPS_PER_HOST or self.topology == "2x4" else _CHIPS_PER_HOST
        if each > _GPUS_PER_HOST and each % _GPUS_PER_HOST:
            raise ConfigError(
                f"{self.target.name} is {each} GPUs, and hosts have {_GPUS_PER_HOST} of them. Use a multiple of "
                f"{_GPUS_PER_HOST}, or fewer than that."
            )
        return min(each, _GPUS_PER_HOST)

    @property
    def num_hosts(self) -> int:
        """One process each."""
        if self.devices_per_host == 0:
            return self.target.num_devices if self.target else self.num_processes
        assert self.target is not None
        return self.target.num_devices // self.devices_per_host


def parse_duration(text: str) -> int:
    """The seconds of a duration such as 90m, 12h or 7d.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"--time-limit got {text!r}. Write a number and s, m, h or d, such as 90m, 12h or 7d."
        )
    return int(match[1]) * _UNITS[match[2]]


def parse_pairs(option: str, pairs: list[str]) -> dict[str, str]:
    """The mapping of `NAME=VALUE` options.

    Raises:
        ConfigError: one has no name or no =.
    """
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"{option} got {pair!r}. Write NAME=VALUE.")
        result[name] = value
    return result
