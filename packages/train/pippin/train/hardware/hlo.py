"""What a compiled program does, read from the text of its HLO: cycles, and what crosses links. No JAX.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as the
loops around it turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_FUSED_SCATTER = "all-reduce-scatter"  # a reduce-scatter whose shape is that of the whole

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # the compiler writes 2^63 - 1 where it has none
_ARRAY = re.compile(r"(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_EXPLICIT_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it has none."""
        found = _CYCLES.search(self.rest)
        cycles = int(found[1]) if found else 0
        return cycles if cycles < _NO_ESTIMATE else 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of transfer among devices."""

    kind: str
    group_size: int
    axes: str  # of the mesh, such as "fsdp" or "data+fsdp"
    sent_bytes: float  # by each device, all times together
    times: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one device does in one run of a program."""

    cycles: int
    collectives: tuple[Collective, ...]
    loops: int  # how many loops there are whose number of turns was found
    unknown_loops: int  # whose number of turns could not be read: they count as one turn


def read_profile(text: str, mesh: Mapping[str, int]) -> Profile:
    """The profile of a compiled program.

    Args:
        text: of the optimised HLO, as `Compiled.as_text()` gives it.
        mesh: the sizes of the mesh's axes, in the order of its devices.
    """
    computations, entry = _parse(text)
    groups = _groups_by_axes(mesh)
    cycles, loops, unknown = 0, 0, 0
    totals: dict[tuple[str, int, str], list[float]] = {}
    for step in _walk(computations, entry, 1):
        if step.instruction.opcode == "while":
            loops, unknown = (loops + 1, unknown) if step.turns else (loops, unknown + 1)
        cycles += step.instruction.cycles * step.times
    for step in _collectives(computations, entry):
        opcode = step.instruction.opcode
        kind = "reduce-scatter" if opcode == _FUSED_SCATTER else opcode.removesuffix("-start")
        members = _groups(step.instruction.rest, mesh)
        size = len(next(iter(members)))
        total = totals.setdefault((kind, size, groups.get(members, "other")), [0.0, 0])
        total[0] += step.times * _sent(kind, step.instruction, size)
        total[1] += step.times
    found = tuple(
        Collective(kind, size, axes, sent, int(times)) for (kind, size, axes), (sent, times) in totals.items()
    )
    return Profile(cycles, tuple(sorted(found, key=lambda c: -c.sent_bytes)), loops, unknown)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(found[2], found[3], found[4]))
    return computations, entry


@dataclasses.dataclass(frozen=True)
class _Step:
    """An instruction that is run."""

    instruction: Instruction
    times: int
    turns: int | None  # of a loop; None: unknown, or it is none
    inside: str  # the computation that holds it


def _walk(computations: Mapping[str, list[Instruction]], name: str, times: int) -> Iterator[_Step]:
    """Every instruction that is run from a computation, fusions as one. All branches of a conditional count."""
    for instruction in computations.get(name, ()):
        turns = _turns(computations, instruction.rest) if instruction.opcode == "while" else None
        yield _Step(instruction, times, turns, name)
        if instruction.opcode in ("fusion", "reduce", "all-reduce", "reduce-scatter", "sort"):
            continue
        for callee in _called(instruction):
            yield from _walk(computations, callee, times * (turns or 1))


def _called(instruction: Instruction) -> list[str]:
    called = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        called += re.findall(r"%([\w.\-]+)", branches)
    return called


def _collectives(computations: Mapping[str, list[Instruction]], entry: str) -> Iterator[_Step]:
    """The transfers, each once wherever it is started.

    libtpu fuses them: one that runs beside other work has a fusion that starts it, some that go on with it and one that
    ends it, which all hold the same instruction with the same channel. A reduce-scatter is a fusion of an all-reduce
    that it names `all-reduce-scatter`.
    """
    seen: set[tuple[str, str]] = set()
    for step in _walk(computations, entry, 1):
        if _is_collective(step.instruction):
            yield step
        if step.instruction.opcode != "fusion":
            continue
        for inner in _fused(computations, step.instruction):
            channel = re.search(r"channel_id=(\d+)", inner.rest)
            if channel and (step.inside, channel[1]) in seen:
                continue
            if channel:
                seen.add((step.inside, channel[1]))
            yield dataclasses.replace(step, instruction=inner)


def _fused(computations: Mapping[str, list[Instruction]], fusion: Instruction) -> Iterator[Instruction]:
    for callee in _called(fusion):
        for instruction in computations.get(callee, ()):
            if _is_collective(instruction):
                scatters = callee.startswith("all-reduce-scatter") and instruction.opcode == "all-reduce"
                yield dataclasses.replace(instruction, opcode=_FUSED_SCATTER) if scatters else instruction
            elif instruction.opcode == "fusion":
                yield from _fused(computations, instruction)


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _turns(computations: Mapping[str, list[Instruction]], rest: str) -> int | None:
    """How often a loop turns that counts from 0 in ones, as those of `jax.lax.scan` do."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", rest)
    lines = computations.get(condition[1], []) if condition else []
    limits = [int(m[1]) for i in lines if i.opcode == "constant" and (m := re.match(r"(\d+)\)", i.rest))]
    return limits[0] if len(limits) == 1 else None


def _array_bytes(shape: str) -> list[int]:
    sizes = []
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return sizes


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """What each device sends: the least that any algorithm on a ring needs."""
    arrays = _array_bytes(instruction.shape)
    # A start holds its operands and its results; the largest is what is gathered or reduced.
    payload = max(arrays, default=0) if instruction.opcode.endswith("-start") else sum(arrays)
    share = (size - 1) / size
    match kind:
        case "all-reduce":
            return 2 * payload * share
        case "reduce-scatter" if instruction.opcode == kind:
            return payload * (size - 1)  # the payload is the part that a device keeps
        case "collective-permute":
            return payload
        case _:
            return payload * share


Groups = frozenset[frozenset[int]]


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


def _groups_by_axes(mesh: Mapping[str, int]) -> dict[Groups, str]:
    """The groups of every set of axes that are longer than 1 -> the set's name."""
    split = [axis for axis, size in mesh.items() if size > 1]
    sets = itertools.chain.from_iterable(itertools.combinations(split, n) for n in range(1, len(split) + 1))
    return {_of_axes(mesh, list(axes)): "+".join(axes) for axes in sets}
