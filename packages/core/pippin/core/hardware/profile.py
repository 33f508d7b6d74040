"""What one device does in one step of a compiled program: how long it computes, and what it sends. No JAX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from pippin.core.hardware.collectives import Collective, is_collective, read_collectives
from pippin.core.hardware.crossings import read_crossings
from pippin.core.hardware.device import Device
from pippin.core.hardware.hlo import Program, Step
from pippin.core.hardware.roofline import moved_bytes, seconds

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # libtpu writes 2^63 - 1 where it has none


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one device does in one run of a program."""

    compiled_s: float  # of what XLA compiled, less kernels and transfers
    moved_bytes: float  # that instructions read and write of the device's memory
    collectives: tuple[Collective, ...]
    link_s: float  # of all transfers, one after the other
    network_s: float  # of those among them that leave a node or a slice
    loops: int  # how many loops there are whose number of turns was found
    unknown_loops: int  # whose number of turns could not be read: they count as one turn


def read_profile(
    text: str,
    mesh: Mapping[str, int],
    device: Device,
    across: Mapping[str, int] | None = None,
    nodes: Sequence[int] = (),
) -> Profile:
    """The profile of a program that was compiled for a kind of device.

    A TPU's compiler estimates the cycles of each instruction. A GPU's does not: `roofline` does.

    Args:
        text: of the optimised HLO, as `Compiled.as_text()` gives it.
        mesh: the sizes of the mesh's axes, in the order of its devices.
        device: what it was compiled for.
        across: of several TPU slices, into how many parts each axis lies over them.
        nodes: of GPUs, the node of each device, in the order of the mesh.
    """
    program = Program(text)
    compiled_s, moved, loops, unknown = 0.0, 0.0, 0, 0
    for step in program.steps():
        if step.instruction.opcode == "while":
            loops, unknown = (loops + 1, unknown) if step.turns else (loops, unknown + 1)
        compiled_s += step.times * _seconds(program, step, device)
        moved += step.times * moved_bytes(program, step)
    across = across or {}
    inside = {axis: size // across.get(axis, 1) for axis, size in mesh.items()}
    collectives = read_collectives(program, inside, nodes) + read_crossings(program, across)
    times = [(c.over_network, c.sent_bytes / device.bandwidth(c.per_node)) for c in collectives]
    link_s = sum((t for _, t in times), start=0.0)
    network_s = sum((t for outside, t in times if outside), start=0.0)
    return Profile(compiled_s, moved, collectives, link_s, network_s, loops, unknown)


def _seconds(program: Program, step: Step, device: Device) -> float:
    if device.gpu is not None:
        return 0.0 if is_collective(step.instruction) else seconds(program, step, device)
    found = _CYCLES.search(step.instruction.rest)
    cycles = int(found[1]) if found else 0
    return cycles / device.clock_hz if cycles < _NO_ESTIMATE else 0.0
