"""The devices of an accelerator that is not there, for its compiler, which is."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental import topologies

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import Target
from pippin.core.hardware.device import DEVICES
from pippin.core.hardware.gpu_compiler import cudnn_left_out, gpu_description, gpu_options

# libtpu asks the machine which TPU it is a part of, unless it is told.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no TPU, so that several may compile at a time
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """What is compiled for."""

    devices: Sequence[Any]  # JAX's
    options: Mapping[str, Any]  # of the compiler
    left_out: str = ""  # what is not compiled here, and why


def topology(target: Target, package: str = "train") -> Topology:
    """What a target is to its compiler.

    Args:
        target: the devices.
        package: of pippin, whose command this is for: for messages.

    Raises:
        ConfigError: there is no compiler for it here, or no such accelerator.
    """
    match target.platform:
        case "tpu":
            return Topology(_tpus(target, package), {})
        case "gpu":
            return _gpus(target, package)
        case _:
            raise ConfigError(
                f"{target.name} is no accelerator: steps for this machine are compiled where they run. Name one of "
                f"{', '.join(kind for kind, device in DEVICES.items() if device.peak_flops)}."
            )


def _tpus(target: Target, package: str) -> Sequence[Any]:
    _require("libtpu", "libtpu, which has the compiler for TPUs,", package, "compile", "tpu")
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    name = f"{target.device.libtpu_name}:{'x'.join(map(str, target.torus()))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=target.num_slices)
        return found.devices
    except (ValueError, RuntimeError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(
            f"libtpu has no {target.name} (topology {name}, slices: {target.num_slices}): {reason}. Try another "
            "number of chips or of slices."
        ) from None


def _gpus(target: Target, package: str) -> Topology:
    plugin = "JAX's CUDA plugin, which has the compiler for NVIDIA GPUs (4.9 GB),"
    _require("jax_cuda12_plugin", plugin, package, "compile_gpu", "cuda")
    nodes, size = target.nodes()
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # JAX looks for a GPU and its libraries
    left_out = cudnn_left_out()
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=gpu_description(target.device), topology=f"1x{nodes}x{size}"
        )
    except (ValueError, RuntimeError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(
            f"JAX's CUDA plugin has no {target.name}: {reason}. Is its version that of jax?"
        ) from None
    return Topology(found.devices, gpu_options(with_cudnn=not left_out), left_out)


def _require(module: str, what: str, package: str, command: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{what} is not installed. Use bazel run //packages/{package}:{command}, or pip install "
            f"'pippin-{package}[{extra}]'."
        )
