"""The text of a compiled program (HLO): its instructions, and how often each is run. No JAX.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as the
loops around it turn.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|called_computations|true_computation|false_computation)=\{?%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")

# What runs its computation as one piece of work, rather than instruction by instruction.
_WHOLE = (
    *("fusion", "reduce", "reduce-window", "sort", "scatter", "select-and-scatter", "map", "custom-call"),
    *("all-reduce", "all-reduce-start", "reduce-scatter", "async-update", "async-done"),
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    is_root: bool = False

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        depth = 1
        for i, c in enumerate(self.rest):
            depth += (c == "(") - (c == ")")
            if depth == 0:
                return re.findall(r"%([\w.\-]+)", self.rest[:i])
        return re.findall(r"%([\w.\-]+)", self.rest)

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        called = _CALLED.findall(self.rest)
        for branches in _BRANCHES.findall(self.rest):
            called += re.findall(r"%([\w.\-]+)", branches)
        return called


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that is run."""

    instruction: Instruction
    times: int
    turns: int | None  # of a loop; None: unknown, or it is none
    inside: str  # the computation that holds it
    around: tuple[str, ...] = ()  # those that run this one, the outermost first


class Program:
    """The computations of a program."""

    def __init__(self, text: str):
        """
        Args:
            text: of the optimised HLO, as `Compiled.as_text()` gives it.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}  # name -> its instructions by name
        self.entry, current = "", None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                shape, opcode = found[3], found[4]
                if (
                    opcode == "fusion-start"
                ):  # one that runs beside others, as GPUs have them: it holds operands too
                    shape, opcode = elements(shape)[1], "fusion"
                current[found[2]] = Instruction(found[2], shape, opcode, found[5], bool(found[1]))

    def instructions(self, computation: str) -> Iterator[Instruction]:
        """Those of a computation, in order."""
        yield from self.computations.get(computation, {}).values()

    def steps(self) -> Iterator[Step]:
        """Every instruction that is run, fusions as one. All branches of a conditional count."""
        yield from self._walk(self.entry, 1, ())

    def _walk(self, name: str, times: int, around: tuple[str, ...]) -> Iterator[Step]:
        for instruction in self.instructions(name):
            turns = self._turns(instruction.rest) if instruction.opcode == "while" else None
            yield Step(instruction, times, turns, name, around)
            if instruction.opcode in _WHOLE:
                continue
            for callee in instruction.called:
                yield from self._walk(callee, times * (turns or 1), (*around, name))

    def _turns(self, rest: str) -> int | None:
        """How often a loop turns that counts from 0 in ones, as those of `jax.lax.scan` do."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
            return int(known[1])
        condition = re.search(r"condition=%([\w.\-]+)", rest)
        lines = self.instructions(condition[1]) if condition else ()
        limits = [int(m[1]) for i in lines if i.opcode == "constant" and (m := re.match(r"(\d+)\)", i.rest))]
        return limits[0] if len(limits) == 1 else None


def dims(shape: str) -> list[tuple[int, ...]]:
    """The dims of each array of a shape."""
    return [tuple(int(d) for d in sizes.split(",") if d) for _, sizes in _ARRAY.findall(shape)]


def array_bytes(shape: str) -> list[int]:
    """The bytes of each array of a shape."""
    sizes = []
    for dtype, of_dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        sizes.append(math.prod(int(d) for d in of_dims.split(",") if d) * bits // 8)
    return sizes


def elements(shape: str) -> list[str]:
    """The parts of a tuple's shape; of an array's, itself alone."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, begin = [], 0, 1
    for i, c in enumerate(shape):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or depth == 0:
            parts.append(shape[begin:i].strip())
            begin = i + 1
    return [part for part in parts if part]


def attribute(instruction: Instruction, name: str) -> list[int]:
    """A list of numbers among the attributes, such as `lhs_contracting_dims={1}`; empty where there is none."""
    found = re.search(rf'{name}"?[=:][{{\[]([\d, "]*)[}}\]]', instruction.rest)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []
