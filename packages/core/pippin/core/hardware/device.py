"""Kinds of accelerators: what one device of each has. No JAX.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"; NVIDIA's data sheets of H100 SXM,
H200 SXM, B200 and of the DGX systems of these (one network adapter of 400 Gb/s for each GPU; dense figures, without
sparsity). A GPU's memory, cores, clock and cache are those that its driver reports, as OpenXLA's descriptions of GPUs
have them. The clock of a TPU is its peak over the multiplications that its matrix units start in a cycle.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What else the compiler for an NVIDIA GPU is told."""

    name: str
    compute_capability: int  # the major number
    cores: int  # streaming multiprocessors
    clock_hz: float
    cache_bytes: int  # the second level


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of accelerator, as JAX sees one device of it."""

    kind: str  # as in names of targets, such as "tpu-v5p"
    memory_bytes: float
    peak_flops: float  # a second, in bfloat16
    link_bandwidth: float  # bytes a second to others of its slice or node, all links together, one way
    memory_bandwidth: float = 0.0  # bytes a second
    network_bandwidth: float = 0.0  # bytes a second to other nodes or slices, one way
    node_size: int = 0  # devices that its links reach; 0: all of a slice
    clock_hz: float = 0.0  # of a TPU's matrix units
    units_per_device: int = 1  # of what the number in a target's name counts: TensorCores for v5p
    devices_per_chip: int = 1
    topology_dims: int = 0  # of a TPU's torus
    jax_names: tuple[str, ...] = ()  # how JAX's device_kind begins
    libtpu_name: str = ""  # of its topologies
    gpu: Gpu | None = None

    def bandwidth(self, per_node: int) -> float:
        """Bytes a second that each device of a group sends to its next, one way.

        Args:
            per_node: how many members the group has in each node that it is in; 0: it is in one node alone. Members
                in a node share the network adapters of all: what comes in by one goes on by links.
        """
        if per_node == 0:
            return self.link_bandwidth
        return min(self.link_bandwidth, per_node * self.network_bandwidth)


_GB = 1e9
_T = 1e12
_GIB = 2.0**30

DEVICES = {
    d.kind: d
    for d in (
        Device(
            "tpu-v5e",
            16 * _GIB,
            197 * _T,
            200 * _GB,
            memory_bandwidth=819 * _GB,
            network_bandwidth=3.125 * _GB,
            clock_hz=1.5e9,
            topology_dims=2,
            jax_names=("TPU v5 lite", "TPU v5e"),
            libtpu_name="v5e",
        ),
        Device(
            "tpu-v5p",
            95 * _GIB,
            459 * _T,
            600 * _GB,
            memory_bandwidth=2765 * _GB,
            network_bandwidth=6.25 * _GB,
            clock_hz=1.75e9,
            units_per_device=2,
            topology_dims=3,
            jax_names=("TPU v5p", "TPU v5"),
            libtpu_name="v5p",
        ),
        Device(
            "tpu-v6e",
            32 * _GIB,
            918 * _T,
            448 * _GB,
            memory_bandwidth=1638 * _GB,
            network_bandwidth=12.5 * _GB,
            clock_hz=1.75e9,
            topology_dims=2,
            jax_names=("TPU v6 lite", "TPU v6e"),
            libtpu_name="v6e",
        ),
        Device(  # half a chip: each of its two TensorCores is a device with a memory of its own
            "tpu-7x",
            96 * _GIB,
            2307 / 2 * _T,
            300 * _GB,
            memory_bandwidth=7380 / 2 * _GB,
            network_bandwidth=6.25 * _GB,
            clock_hz=2.2e9,
            devices_per_chip=2,
            topology_dims=3,
            jax_names=("TPU7x",),
            libtpu_name="tpu7x",
        ),
        Device(
            "gpu-h100",
            84_942_979_072.0,
            989 * _T,
            450 * _GB,
            memory_bandwidth=3.35 * _T,
            network_bandwidth=50 * _GB,
            node_size=8,
            jax_names=("NVIDIA H100",),
            gpu=Gpu("NVIDIA H100 80GB HBM3", 9, 132, 1.98e9, 50 * 2**20),
        ),
        Device(
            "gpu-h200",
            151_397_597_184.0,
            989 * _T,
            450 * _GB,
            memory_bandwidth=4.8 * _T,
            network_bandwidth=50 * _GB,
            node_size=8,
            jax_names=("NVIDIA H200",),
            gpu=Gpu("NVIDIA H200", 9, 132, 1.98e9, 50 * 2**20),
        ),
        Device(
            "gpu-b200",
            191_514_411_008.0,
            2250 * _T,
            900 * _GB,
            memory_bandwidth=8 * _T,
            network_bandwidth=50 * _GB,
            node_size=8,
            jax_names=("NVIDIA B200",),
            gpu=Gpu("NVIDIA B200", 10, 148, 1.965e9, 132_644_864),
        ),
        Device("cpu", 0.0, 0.0, 0.0, jax_names=("cpu",)),
    )
}
