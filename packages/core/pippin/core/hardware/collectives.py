"""What a compiled program sends among devices, by kind and by the mesh axes along which it goes. No JAX."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pippin.core.hardware.hlo import Instruction, Program, Step, array_bytes, elements

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_FUSED_SCATTER = "all-reduce-scatter"  # a reduce-scatter whose shape is that of the whole

_EXPLICIT_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")

# Sets of devices that exchange with each other, by their place in the mesh.
Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of transfer among devices."""

    kind: str
    group_size: int
    axes: str  # of the mesh, such as "fsdp" or "data+fsdp"
    per_node: int  # members of a group in each node or slice that it is in; 0: all are in one
    sent_bytes: float  # by each device, all times together
    times: int

    @property
    def over_network(self) -> bool:
        """Whether it leaves a node or a slice."""
        return self.per_node > 0


def read_collectives(
    program: Program, mesh: Mapping[str, int], nodes: Sequence[int] = ()
) -> tuple[Collective, ...]:
    """The transfers of a program, those that send most first.

    Args:
        program: the compiled program.
        mesh: the sizes of the mesh's axes, in the order of its devices.
        nodes: that of each device, in the order of the mesh; none: all are in one.
    """
    names = groups_by_axes(mesh)
    totals: dict[tuple[str, int, str, int], list[float]] = {}
    for step in _collectives(program):
        opcode = step.instruction.opcode
        kind = "reduce-scatter" if opcode == _FUSED_SCATTER else opcode.removesuffix("-start")
        groups = _groups(step.instruction.rest, mesh)
        size = max(len(group) for group in groups)
        key = (kind, size, names.get(groups, "other"), _per_node(groups, nodes))
        total = totals.setdefault(key, [0.0, 0])
        total[0] += step.times * _sent(kind, step.instruction, size)
        total[1] += step.times
    found = (Collective(*key, sent, int(times)) for key, (sent, times) in totals.items())
    return tuple(sorted(found, key=lambda c: -c.sent_bytes))


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction is, or begins, a transfer."""
    return instruction.opcode.removesuffix("-start") in _KINDS


def _collectives(program: Program) -> Iterator[Step]:
    """The transfers, each once wherever it is started.

    libtpu fuses them: one that runs beside other work has a fusion that starts it, some that go on with it, in a loop of
    that work too, and one that ends it, which all hold the same instruction with the same channel. A reduce-scatter is
    a fusion of an all-reduce that it names `all-reduce-scatter`.
    """
    fused = [
        (step, inner, found[1])
        for step in program.steps()
        if step.instruction.opcode == "fusion"
        for inner in _fused(program, step.instruction)
        if (found := re.search(r"channel_id=(\d+)", inner.rest))
    ]
    started = {(step.inside, channel) for step, _, channel in fused}
    for step in program.steps():
        if is_collective(step.instruction):
            yield step
    seen: set[tuple[str, str]] = set()
    for step, inner, channel in fused:
        goes_on = any((outer, channel) in started for outer in step.around)
        if not goes_on and (step.inside, channel) not in seen:
            seen.add((step.inside, channel))
            yield dataclasses.replace(step, instruction=inner)


def _fused(program: Program, fusion: Instruction) -> Iterator[Instruction]:
    for callee in fusion.called:
        for instruction in program.instructions(callee):
            if is_collective(instruction):
                scatters = callee.startswith("all-reduce-scatter") and instruction.opcode == "all-reduce"
                yield dataclasses.replace(instruction, opcode=_FUSED_SCATTER) if scatters else instruction
            elif instruction.opcode == "fusion":
                yield from _fused(program, instruction)


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """What each device sends: the least that any algorithm on a ring needs."""
    payload = float(_payload(kind, instruction))
    share = (size - 1) / size
    match kind:
        case "all-reduce":
            return 2 * payload * share
        case "reduce-scatter" if instruction.opcode != _FUSED_SCATTER:
            return payload * (size - 1)  # the payload is the part that a device keeps
        case "collective-permute":
            return payload
        case _:
            return payload * share


def _payload(kind: str, instruction: Instruction) -> int:
    """The bytes of the results."""
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        shape = elements(shape)[1]  # the operands, the results, and what the transfer needs
    return sum(array_bytes(shape))


def _per_node(groups: Groups, nodes: Sequence[int]) -> int:
    if not nodes:
        return 0
    most = 0
    for group in groups:
        count = collections.Counter(nodes[device] for device in group)
        if len(count) > 1:
            most = max(most, *count.values())
    return most


def _groups(rest: str, mesh: Mapping[str, int]) -> Groups:
    """The devices that exchange with each other, by their place in the mesh."""
    if found := _EXPLICIT_GROUPS.search(rest):
        return _sets(re.findall(r"\{([\d, ]*)\}", found[1]))
    if found := _PAIRS.search(rest):
        return _connected(re.findall(r"\{([\d, ]*)\}", found[1]))
    if found := _IOTA_GROUPS.search(rest):
        shape, source = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        devices = np.arange(math.prod(source)).reshape(source)
        if found[3]:
            devices = devices.transpose([int(n) for n in found[3].split(",")])
        return frozenset(frozenset(row.tolist()) for row in devices.reshape(shape))
    if found := _MESH_GROUPS.search(rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        names = re.findall(r"'(\w+)'", found[2])
        if set(names) <= set(sizes) and ":" not in found[2]:
            return _of_axes(sizes, names)
    return frozenset([frozenset(range(math.prod(mesh.values())))])


def _sets(texts: list[str]) -> Groups:
    return frozenset(frozenset(int(n) for n in t.split(",")) for t in texts if t.strip())


def _connected(pairs: list[str]) -> Groups:
    """The devices that a permutation connects."""
    group: dict[int, set[int]] = {}
    for pair in pairs:
        a, b = (int(n) for n in pair.split(","))
        joined = group.get(a, {a}) | group.get(b, {b})
        for member in joined:
            group[member] = joined
    return frozenset(frozenset(g) for g in group.values())


def _of_axes(sizes: Mapping[str, int], names: list[str]) -> Groups:
    devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    inside = [list(sizes).index(n) for n in names]
    outside = [i for i in range(len(sizes)) if i not in inside]
    rows = devices.transpose([*outside, *inside]).reshape(-1, math.prod(sizes[n] for n in names))
    return frozenset(frozenset(row.tolist()) for row in rows)


def groups_by_axes(mesh: Mapping[str, int]) -> dict[Groups, str]:
    """The groups of every set of axes that are longer than 1 -> the set's name."""
    split = [axis for axis, size in mesh.items() if size > 1]
    sets = itertools.chain.from_iterable(itertools.combinations(split, n) for n in range(1, len(split) + 1))
    return {_of_axes(mesh, list(axes)): "+".join(axes) for axes in sets}
