"""Accelerators: what one device of each kind has, and names such as `tpu-v5p-512`. No JAX.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e"; NVIDIA's data sheets of H100 SXM,
H200 SXM and B200 (dense figures, without sparsity). The clock of a TPU is its peak over the multiplications that its
matrix units start in a cycle. Links are those inside a slice or node, all of a device together, one way.
"""

from __future__ import annotations

import dataclasses
import re

from pippin.core.config import nearest
from pippin.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of accelerator, as JAX sees one device of it."""

    kind: str  # as in names of targets, such as "tpu-v5p"
    memory_bytes: float
    peak_flops: float  # a second, in bfloat16
    link_bandwidth: float  # bytes a second to other devices
    clock_hz: float = 0.0  # of a TPU's matrix units
    units_per_device: int = 1  # of what the number in a target's name counts: TensorCores for v5p
    topology_dims: int = 0  # of a TPU's torus
    jax_names: tuple[str, ...] = ()  # how JAX's device_kind begins
    libtpu_name: str = ""  # of its topologies


_GB = 1e9
_T = 1e12

DEVICES = {
    d.kind: d
    for d in (
        Device(
            "tpu-v5e",
            16.0 * 2**30,
            197 * _T,
            200 * _GB,
            1.5e9,
            topology_dims=2,
            jax_names=("TPU v5 lite", "TPU v5e"),
            libtpu_name="v5e",
        ),
        Device(
            "tpu-v5p",
            95.0 * 2**30,
            459 * _T,
            600 * _GB,
            1.75e9,
            units_per_device=2,
            topology_dims=3,
            jax_names=("TPU v5p", "TPU v5"),
            libtpu_name="v5p",
        ),
        Device(
            "tpu-v6e",
            32.0 * 2**30,
            918 * _T,
            448 * _GB,
            1.75e9,
            topology_dims=2,
            jax_names=("TPU v6 lite", "TPU v6e"),
            libtpu_name="v6e",
        ),
        Device(
            "gpu-h100",
            80 * _GB,
            989 * _T,
            450 * _GB,
            jax_names=("NVIDIA H100",),
        ),
        Device(
            "gpu-h200",
            141 * _GB,
            989 * _T,
            450 * _GB,
            jax_names=("NVIDIA H200",),
        ),
        Device(
            "gpu-b200",
            180 * _GB,
            2250 * _T,
            900 * _GB,
            jax_names=("NVIDIA B200",),
        ),
        Device("cpu", 0.0, 0.0, 0.0, jax_names=("cpu",)),
    )
}

# Chips -> the torus of a slice, as Google Cloud offers it.
_SLICES = {
    2: {
        1: (1, 1),
        4: (2, 2),
        8: (2, 4),
        16: (4, 4),
        32: (4, 8),
        64: (8, 8),
        128: (8, 16),
        256: (16, 16),
    },
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
        1024: (8, 8, 16),
        2048: (8, 16, 16),
        4096: (16, 16, 16),
    },
}


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of a kind."""

    device: Device
    num_devices: int

    @property
    def name(self) -> str:
        """Such as "tpu-v5p-512", which has 256 devices: the name counts TensorCores, as Google's does."""
        return f"{self.device.kind}-{self.num_devices * self.device.units_per_device}"

    @property
    def platform(self) -> str:
        """JAX's: "tpu", "gpu" or "cpu"."""
        return self.device.kind.partition("-")[0]

    def slices(self) -> tuple[tuple[int, ...], int]:
        """The torus of a TPU slice, and how many slices there are.

        Raises:
            ConfigError: no slice has so many devices.
        """
        known = _SLICES[self.device.topology_dims]
        largest = max(known)
        if self.num_devices in known:
            return known[self.num_devices], 1
        if self.num_devices > largest and self.num_devices % largest == 0:
            return known[largest], self.num_devices // largest
        units = self.device.units_per_device
        raise ConfigError(
            f"{self.name} is no TPU that there is: slices of {self.device.kind} are "
            f"{', '.join(f'{self.device.kind}-{n * units}' for n in known)}, and several of the largest. Use one of these."
        )


def parse_target(name: str) -> Target:
    """The target of a name such as `tpu-v5p-512` or `gpu-h100-256`.

    Raises:
        ConfigError: there is no such accelerator, or the number does not fit it.
    """
    match = re.fullmatch(r"(.+)-(\d+)", name)
    kind = match[1] if match else name
    if kind not in DEVICES:
        raise ConfigError(
            f"unknown target {name!r}{nearest(kind, list(DEVICES))}. Write KIND-COUNT, such as tpu-v5p-512; kinds are "
            f"{', '.join(DEVICES)}."
        )
    device, count = DEVICES[kind], int(match[2]) if match else 0
    if count < 1 or count % device.units_per_device:
        raise ConfigError(
            f"target {name!r} needs a number of at least 1"
            + (
                f", a multiple of {device.units_per_device} (it counts TensorCores)"
                if device.units_per_device > 1
                else ""
            )
            + f". Write {kind}-{device.units_per_device * 4}, for instance."
        )
    return Target(device, count // device.units_per_device)


def target_of(device_kind: str, num_devices: int, platform: str) -> Target:
    """What JAX's devices are; of a kind without an entry here, a target without figures, such as "gpu-other-8".

    Args:
        device_kind: JAX's name of the first device's kind.
        num_devices: over all processes.
        platform: JAX's: "tpu", "gpu" or "cpu".
    """
    for device in DEVICES.values():
        if any(device_kind.startswith(name) for name in device.jax_names):
            return Target(device, num_devices)
    return Target(Device(f"{platform}-other", 0.0, 0.0, 0.0), num_devices)
