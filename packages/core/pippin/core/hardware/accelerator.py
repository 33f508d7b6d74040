"""Targets, such as `tpu-v5p-512` or, of two slices, `tpu-v5e-256x2`: so many devices of a kind. No JAX."""

from __future__ import annotations

import dataclasses
import re

from pippin.core.config import nearest
from pippin.core.errors import ConfigError
from pippin.core.hardware.device import DEVICES, Device

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
    num_devices: int  # of all slices together
    num_slices: int = 1  # of TPUs, all of one size, which a network connects

    @property
    def name(self) -> str:
        """Such as "tpu-v5p-512", which has 256 devices: the name counts TensorCores, as Google's does.

        "tpu-v5p-512x4" is four slices of these.
        """
        units = self.num_devices // self.num_slices * self.device.units_per_device
        return f"{self.device.kind}-{units}" + (f"x{self.num_slices}" if self.num_slices > 1 else "")

    @property
    def platform(self) -> str:
        """JAX's: "tpu", "gpu" or "cpu"."""
        return self.device.kind.partition("-")[0]

    def torus(self) -> tuple[int, ...]:
        """That of each TPU slice.

        Raises:
            ConfigError: no slice has so many devices.
        """
        known = _SLICES[self.device.topology_dims]
        chips, rest = divmod(self.num_devices // self.num_slices, self.device.devices_per_chip)
        if not rest and chips in known:
            return known[chips]
        units = self.device.units_per_device * self.device.devices_per_chip
        names = [f"{self.device.kind}-{n * units}" for n in known]
        raise ConfigError(
            f"{self.name} is no TPU that there is: slices of {self.device.kind} are {', '.join(names)}. Use one of these, "
            f"or several slices of one, such as {names[-1]}x2."
        )

    def nodes(self) -> tuple[int, int]:
        """How many nodes of GPUs there are, and how many GPUs each has.

        Raises:
            ConfigError: they do not fill their nodes.
        """
        size = self.device.node_size
        if self.num_devices <= size and size % self.num_devices == 0:
            return 1, self.num_devices
        if self.num_devices % size:
            raise ConfigError(
                f"{self.name} does not fill its nodes, which have {size} GPUs each. Use {self.device.kind}-{size}, "
                f"or a multiple of {size}."
            )
        return self.num_devices // size, size


def parse_target(name: str) -> Target:
    """The target of a name such as `tpu-v5p-512`, `tpu-v5p-512x4` (four slices), or `gpu-h100-256`.

    Raises:
        ConfigError: there is no such accelerator, or the number does not fit it.
    """
    match = re.fullmatch(r"(.+)-(\d+)(?:x(\d+))?", name)
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
    target = Target(device, count // device.units_per_device)
    if match is None or match[3] is None:
        return target
    slices = int(match[3])
    if target.platform != "tpu" or slices < 1:
        raise ConfigError(
            f"target {name!r}: what follows the x is how many slices there are, at least 1, and slices are of TPUs. "
            + (
                f"Write {kind}-{count}x2, for instance."
                if target.platform == "tpu"
                else f"Write how many devices there are in all: {kind}-{count * max(slices, 1)}."
            )
        )
    return Target(device, target.num_devices * slices, slices)


def target_of(device_kind: str, num_devices: int, platform: str, num_slices: int = 1) -> Target:
    """What JAX's devices are; of a kind without an entry here, a target without figures, such as "gpu-other-8".

    Args:
        device_kind: JAX's name of the first device's kind.
        num_devices: over all processes.
        platform: JAX's: "tpu", "gpu" or "cpu".
        num_slices: of TPUs.
    """
    for device in DEVICES.values():
        if any(device_kind.startswith(name) for name in device.jax_names):
            return Target(device, num_devices, num_slices)
    return Target(Device(f"{platform}-other", 0.0, 0.0, 0.0), num_devices, num_slices)
