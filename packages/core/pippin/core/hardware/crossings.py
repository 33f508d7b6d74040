"""What a compiled program of several TPU slices sends from slice to slice, by kind and by mesh axes. No JAX.

libtpu compiles one slice. What leaves it goes by way of the hosts: a `send` and a `recv` whose attributes say what
kind of transfer it is, and among whom. Slices count from 1 there, and devices within them from 0: device 3 of slice
2 is 200003.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pippin.core.hardware.collectives import Collective, Groups, groups_by_axes
from pippin.core.hardware.hlo import Instruction, Program, array_bytes, elements

_KINDS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
    "REDUCE_SCATTER": "reduce-scatter",
}
_KIND = re.compile(r'_xla_megascale_transfer_type="?(\w+)')
_TARGET = re.compile(r'_xla_megascale_target="?([{}\d,:x> -]*[}\d])')
_FIRST_ID = 100_000  # of slice 1


def read_crossings(program: Program, across: Mapping[str, int]) -> tuple[Collective, ...]:
    """The transfers between slices, those that send most first.

    Args:
        program: the compiled program.
        across: into how many parts each axis of the mesh lies over the slices.
    """
    names = groups_by_axes(across)
    totals: dict[tuple[str, int, str], list[float]] = {}
    for step in program.steps():
        found = _KIND.search(step.instruction.rest)
        if step.instruction.opcode != "send" or found is None:
            continue
        groups = _groups(step.instruction.rest)
        size = max(len(group) for group in groups)
        kind = _KINDS.get(found[1], found[1].lower())
        total = totals.setdefault((kind, size, names.get(groups, "other")), [0.0, 0])
        total[0] += step.times * _sent(kind, step.instruction, size)
        total[1] += step.times
    # A device has only its own share of the network: there is no other of its group in its slice.
    crossings = (Collective(*key, 1, sent, int(times)) for key, (sent, times) in totals.items())
    return tuple(sorted(crossings, key=lambda c: -c.sent_bytes))


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """What each device sends: the least that any algorithm on a ring needs. The payload is what it gives."""
    payload = float(sum(array_bytes(elements(instruction.shape)[0])))
    match kind:
        case "all-reduce":
            return 2 * payload * (size - 1) / size
        case "all-gather":
            return payload * (size - 1)
        case "collective-permute":
            return payload
        case _:
            return payload * (size - 1) / size


def _groups(rest: str) -> Groups:
    """The sets of slices, from 0, that exchange with each other."""
    found = _TARGET.search(rest)
    if found is None:
        raise ValueError(f"a transfer between slices has no target that can be read: {rest[:500]}")
    slices, among_devices, _ = found[1].partition("x")
    first = 1 if among_devices else _FIRST_ID
    members = [
        [int(n) // first for n in re.findall(r"\d+", part)] for part in re.findall(r"\{([^{}]*)\}", slices)
    ]
    return _joined([frozenset(number - 1 for number in group) for group in members])


def _joined(groups: list[frozenset[int]]) -> Groups:
    """The groups, of which those that share a slice are one: a permutation is pairs, such as `{1 -> 2}, {2 -> 1}`."""
    joined: set[frozenset[int]] = set()
    for group in groups:
        meeting = {other for other in joined if other & group}
        joined = (joined - meeting) | {group.union(*meeting)}
    return frozenset(joined)
