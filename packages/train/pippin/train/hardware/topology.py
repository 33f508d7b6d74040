"""The devices of a TPU that is not there, for its compiler, which is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from pippin.core.errors import ConfigError
from pippin.train.hardware.accelerator import Target

# libtpu asks the machine which TPU it is a part of, unless it is told.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no TPU, so that several may compile at a time
}


def topology_devices(target: Target) -> Sequence[Any]:
    """JAX's devices of a target, to compile for.

    Raises:
        ConfigError: there is no compiler for it here, or it is no TPU that there is.
    """
    if target.platform != "tpu":
        raise ConfigError(
            f"{target.name} is no TPU: compile has the compilers of {', '.join(_names())} alone. Name one of these."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu, which has the compiler for TPUs, is not installed. Use bazel run //packages/train:compile, or "
            "pip install 'pippin-train[tpu]'."
        )
    torus, slices = target.slices()
    if slices > 1:
        raise ConfigError(
            f"{target.name} is {slices} slices, and what crosses the network between slices is not estimated. Name one "
            f"slice: at most {target.device.kind}-{target.num_devices // slices * target.device.units_per_device}."
        )
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    name = f"{target.device.libtpu_name}:{'x'.join(map(str, torus))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (ValueError, RuntimeError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(f"libtpu has no topology {name}: {reason}. Try another number of chips.") from None


def _names() -> list[str]:
    from pippin.train.hardware.accelerator import DEVICES

    return [kind for kind, device in DEVICES.items() if device.libtpu_name]
