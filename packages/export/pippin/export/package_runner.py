"""Runs a package of a language model as an app does: a prompt in parts, then token by token, the caches kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pippin.export.mil.errors import PackageError
from pippin.export.mil.interpreter import Interpreter
from pippin.export.mil.program import Program

PREFILL, DECODE = "prefill", "decode"
IDS, POSITION, MASK, ADAPTER, LOGITS = "inputIds", "position", "causalMask", "adapter", "logits"
_INPUTS = {IDS, POSITION, MASK}


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a function."""

    function: str
    inputs: Mapping[str, np.ndarray]
    tokens: int  # those that are no padding
    logits: np.ndarray  # [tokens, V]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a package's functions take."""

    context: int  # tokens that the caches hold
    prefill: int  # tokens of a prompt that are read at a time
    vocab: int
    adapter: int  # numbers of an adapter; 0: the package takes none


def sizes(program: Program) -> Sizes:
    """What the functions of a program take.

    Raises:
        PackageError: they are not those of a language model as pippin exports it.
    """
    functions = program.functions
    if set(functions) != {PREFILL, DECODE}:
        raise PackageError(
            f"{program.path} has the functions {', '.join(functions)}; a language model has {PREFILL} and {DECODE}. Give a "
            "package that //packages/export:coreml wrote."
        )
    found = set()
    for function in functions.values():
        names = set(function.inputs)
        if names - {ADAPTER} != _INPUTS or set(function.outputs) != {LOGITS}:
            raise PackageError(
                f"{function.name} takes {', '.join(sorted(names))} and gives {', '.join(function.outputs)}; it must take "
                f"{', '.join(sorted(_INPUTS))}, perhaps {ADAPTER}, and give {LOGITS}. Export the package again."
            )
        adapter = function.inputs[ADAPTER].shape[0] if ADAPTER in names else 0
        context, vocab = function.inputs[MASK].shape[-1], function.outputs[LOGITS].shape[-1]
        found.add(Sizes(context, functions[PREFILL].inputs[IDS].shape[-1], vocab, adapter))
    if len(found) != 1 or functions[DECODE].inputs[IDS].shape != (1, 1):
        raise PackageError(
            f"the functions of {program.path} are of different sizes. Export the package again."
        )
    return found.pop()


def causal_mask(position: int, length: int, context: int) -> np.ndarray:
    """Which slots of the caches each of `length` tokens may see: 0, and -inf where not; float16 [1, 1, T, context]."""
    seen = np.arange(context)[None] <= position + np.arange(length)[:, None]
    return np.where(seen, 0, -np.inf).astype(np.float16)[None, None]


class PackageRunner:
    """A text that grows."""

    def __init__(self, interpreter: Interpreter, adapter: np.ndarray | None = None):
        """
        Args:
            interpreter: of the package.
            adapter: the flat input of one, float16; none is zeros.

        Raises:
            PackageError: the package is of no language model, or takes another adapter.
        """
        self._interpreter = interpreter
        self.sizes = sizes(interpreter.program)
        self.state = interpreter.make_state()
        self.position = 0
        self.calls: list[Call] = []
        if adapter is not None and adapter.shape != (self.sizes.adapter,):
            raise PackageError(
                f"the adapter has {list(adapter.shape)} numbers, and the package takes {self.sizes.adapter}. Export the "
                "package with --adapter-rank, and the adapter with the package."
            )
        self._adapter = np.zeros(self.sizes.adapter, np.float16) if adapter is None else adapter

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of the next tokens, [T, V]. One alone is decoded; more are read in parts.

        Raises:
            PackageError: the caches cannot hold them.
        """
        if len(ids) == 1:
            return self._call(DECODE, ids, 1)
        size = self.sizes.prefill
        return np.concatenate(
            [self._call(PREFILL, ids[at : at + size], size) for at in range(0, len(ids), size)]
        )

    def _call(self, function: str, ids: Sequence[int], length: int) -> np.ndarray:
        if self.position + length > self.sizes.context:
            raise PackageError(
                f"tokens {self.position} to {self.position + length - 1} do not fit in caches of {self.sizes.context}. Take "
                "fewer, or export the package with a larger --context."
            )
        inputs = {
            IDS: np.array([[*ids, *[0] * (length - len(ids))]], np.int32),
            POSITION: np.array([self.position], np.int32),
            MASK: causal_mask(self.position, length, self.sizes.context),
        }
        if self.sizes.adapter:
            inputs[ADAPTER] = self._adapter
        logits = self._interpreter.run(function, inputs, self.state)[LOGITS][0, : len(ids)]
        self.calls.append(Call(function, inputs, len(ids), logits))
        self.position += len(ids)
        return logits
