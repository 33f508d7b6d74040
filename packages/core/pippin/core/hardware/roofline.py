"""How long a GPU needs at least for each instruction: its compiler estimates no time of its own. No JAX.

An instruction takes the longer of two: its matmuls at the GPU's peak, and what it reads and writes at the speed of
its memory. What no program reaches counts as reached, so that a real step is slower.
"""

from __future__ import annotations

import math
import re

from pippin.core.hardware.collectives import is_collective
from pippin.core.hardware.device import Device
from pippin.core.hardware.hlo import Instruction, Program, Step, array_bytes, attribute, dims, elements

_ON_CHIP = re.compile(r"[a-z]+\d*\[[\d,]*\]\{[^{}]*S\([1-9]\d*\)[^{}]*\}")

# What does no work of its own: names for values, control, and transfers, which are counted elsewhere.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *(
        "send",
        "recv",
        "after-all",
        "partition-id",
        "replica-id",
        "async-start",
        "async-update",
        "async-done",
        "opt-barrier",
    ),
)
_READS_A_PART = ("dynamic-slice", "slice", "gather")
_WRITES_A_PART = {"dynamic-update-slice": 1, "scatter": 2}  # -> which operand is the part


def seconds(program: Program, step: Step, device: Device) -> float:
    """One run of an instruction; 0 for kernels of cuDNN, whose work is counted by what they were asked for."""
    if device.gpu is None:
        raise ValueError(f"{device.kind} is no GPU.")
    if "__cudnn$fmha" in step.instruction.rest:
        return 0.0
    return max(
        _matmul_seconds(program, step.inside, step.instruction, device.peak_flops),
        moved_bytes(program, step) / device.memory_bandwidth,
    )


def moved_bytes(program: Program, step: Step) -> float:
    """What one run of an instruction reads and writes of the device's memory; transfers do not count."""
    instruction = step.instruction
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done") or is_collective(instruction):
        return 0.0
    return _moved_bytes(program, step.inside, instruction)


def _matmul_seconds(program: Program, inside: str, instruction: Instruction, peak: float) -> float:
    """Of all matmuls of an instruction. Those of float32 are done in TF32, at half the speed of bfloat16."""
    if instruction.opcode == "fusion":
        return sum(
            _matmul_seconds(program, callee, inner, peak)
            for callee in instruction.called
            for inner in program.instructions(callee)
        )
    if instruction.opcode == "dot":
        contracted = attribute(instruction, "lhs_contracting_dims")
    elif "__cublas$" in instruction.rest:
        contracted = attribute(instruction, "lhs_contracting_dimensions")
    else:
        return 0.0
    left = _shape(program, inside, instruction.operands[0])
    inner = math.prod(dims(left)[0][d] for d in contracted)
    flops = 2.0 * math.prod(dims(elements(instruction.shape)[0])[0]) * inner
    return flops / (peak / 2 if left.startswith("f32") else peak)


def _moved_bytes(program: Program, inside: str, instruction: Instruction) -> float:
    """What an instruction reads and writes. Of an array of which it needs a part, or changes one in place, the part."""
    operands = [_shape(program, inside, name) for name in instruction.operands]
    if instruction.opcode == "copy-start":
        return _total(*elements(instruction.shape)[:2])  # to, and from
    if instruction.opcode != "fusion":
        if instruction.opcode in _WRITES_A_PART:
            return 2.0 * sum(array_bytes(operands[_WRITES_A_PART[instruction.opcode]]))
        read = 0 if instruction.opcode in _READS_A_PART else _total(*operands)
        return read + _total(instruction.shape)
    (callee,) = instruction.called
    body = list(program.instructions(callee))
    parameters = [i for i in body if i.opcode == "parameter"]
    by_number = {int(i.rest.partition(")")[0]): i for i in parameters}
    read = sum(_read_of(by_number[n], shape, body) for n, shape in enumerate(operands) if n in by_number)
    return read + _written(program, callee, instruction, body)


def _read_of(parameter: Instruction, shape: str, body: list[Instruction]) -> float:
    """What a fusion reads of one of its operands."""
    users = [i for i in body if parameter.name in i.operands]
    if users and all(is_collective(i) for i in users):
        return 0.0  # a transfer that is fused with other work
    if users and all(
        i.opcode in (*_READS_A_PART, *_WRITES_A_PART) and i.operands[0] == parameter.name for i in users
    ):
        return float(sum(_total(i.shape) for i in users if i.opcode in _READS_A_PART))
    return _total(shape)


def _written(program: Program, callee: str, fusion: Instruction, body: list[Instruction]) -> float:
    """What a fusion writes."""
    root = next(i for i in body if i.is_root)
    parts = root.operands if root.opcode == "tuple" else [root.name]
    total = 0.0
    for part, shape in zip(parts, elements(fusion.shape), strict=False):
        made_by = _behind(program.computations[callee], part)
        if is_collective(made_by):
            continue
        if made_by.opcode in _WRITES_A_PART:
            changed = made_by.operands[_WRITES_A_PART[made_by.opcode]]
            total += _total(_shape(program, callee, changed))
        else:
            total += _total(shape)
    return total


def _behind(body: dict[str, Instruction], name: str) -> Instruction:
    """The instruction that made a value, behind other names for it."""
    instruction = body[name]
    while instruction.opcode in ("bitcast", "convert", "copy") and instruction.operands[0] in body:
        instruction = body[instruction.operands[0]]
    return instruction


def _shape(program: Program, inside: str, name: str) -> str:
    """Of a value; empty, so that it counts nothing, where its line was none that `Program` reads."""
    found = program.computations[inside].get(name)
    return found.shape if found else ""


def _total(*shapes: str) -> float:
    """The bytes of arrays in the device's memory: not those that a TPU holds on its chip."""
    return float(sum(sum(array_bytes(_ON_CHIP.sub("", shape))) for shape in shapes))
