"""The names of Core AI's authoring library and runtime that are used here. Nothing else imports it; import this late.

The library's public face has no states: handles, tokens, and a graph that takes them, come from below it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import coreai.authoring
import coreai.runtime
import numpy as np
from coreai._compiler.dialects import coreai as dialect
from coreai._compiler.dialects._coreai_ops_gen import ConstantOp
from coreai._compiler.dialects.coreai.constant import create_constant_attr
from coreai._compiler.ir import (
    ArrayAttr,
    DenseResourceElementsAttr,
    DictAttr,
    IntegerType,
    RankedTensorType,
    StringAttr,
)
from coreai.authoring import AIModelAsset, AIProgram, HandleType, Module, TensorType, TokenType
from coreai.authoring.graph_builder import GraphOp

from pippin.core.quantized_array import pack

__all__ = [
    "AIModelAsset",
    "AIModelAssetMetadata",
    "AIProgram",
    "Constants",
    "Function",
    "Module",
    "NDArray",
    "TensorType",
    "Value",
    "ops",
]


# Their annotations say less than what they take and give.
ops: Any = coreai.authoring
NDArray: Any = coreai.runtime.NDArray
AIModelAssetMetadata: Any = coreai.runtime.AIModelAssetMetadata
Value = Any  # a value of the program

_from_mlir = coreai.authoring.Value._from_mlir


class Constants:
    """The constants of a module: stored once, in however many functions they are."""

    def __init__(self) -> None:
        self._stored: dict[str, Any] = {}

    def value(self, name: str, values: np.ndarray, bits: int | None = None) -> Value:
        """A constant in the function that is written. The same name stands for the same values.

        Args:
            name: of the constant.
            values: it is stored as they are typed.
            bits: of uint8 or int8 those that count, where they are fewer than 8.
        """
        if name not in self._stored:
            self._stored[name] = (
                create_constant_attr(np.ascontiguousarray(values))
                if bits in (None, 8)
                else _packed(values, bits)
            )
        return _from_mlir(ConstantOp(value=self._stored[name]).result)


class Function:
    """A function of a module while it is written: inputs, and states that are read once and written once."""

    def __init__(
        self,
        name: str,
        inputs: Mapping[str, TensorType],
        states: Mapping[str, TensorType],
        outputs: Mapping[str, TensorType],
    ):
        handles = {key: HandleType(kind)._to_mlir() for key, kind in states.items()}
        taken = {key: kind._to_mlir() for key, kind in inputs.items()} | handles
        given = {key: kind._to_mlir() for key, kind in outputs.items()}
        tokens = [TokenType()._to_mlir()] * len(states)  # that states were written
        self._graph = GraphOp(name, [*taken.values()], [*given.values(), *tokens])
        self._graph.arg_attrs = ArrayAttr.get([_named(key) for key in taken])
        self._graph.res_attrs = ArrayAttr.get([*map(_named, given), *(DictAttr.get({}) for _ in tokens)])
        arguments = dict(zip(taken, self._graph.arguments, strict=True))
        self.inputs = {key: _from_mlir(arguments[key]) for key in inputs}
        self._handles = {key: arguments[key] for key in states}
        self._tokens: dict[str, Any] = {}

    @contextlib.contextmanager
    def body(self) -> Iterator[None]:
        """What is written in the block is written into the function."""
        with self._graph.block:
            yield

    def read(self, state: str) -> Value:
        """The value of a state when the function is called."""
        read: Any = dialect.read_handle(self._handles[state], dialect.create_token())
        value, self._tokens[state] = read
        return _from_mlir(value)

    def write(self, state: str, value: Value) -> None:
        """Gives a state that was read its value for the next call."""
        self._tokens[state] = dialect.write_handle(
            self._handles[state], value._to_mlir(), self._tokens[state]
        )

    def end(self, outputs: Sequence[Value]) -> None:
        """Ends the function with what it gives."""
        dialect.output([*(value._to_mlir() for value in outputs), *self._tokens.values()])


def _packed(values: np.ndarray, bits: int) -> Any:
    """Integers end to end, as the runtime reads them; the library's own way to make a constant gives each a byte."""
    signed = np.issubdtype(values.dtype, np.signedinteger)
    element = IntegerType.get_signed(bits) if signed else IntegerType.get_unsigned(bits)
    kind = RankedTensorType.get(list(values.shape), element)
    return DenseResourceElementsAttr.get_from_buffer(pack(values, bits), "packed", kind)


def _named(name: str) -> DictAttr:
    return DictAttr.get({"coreai.name": StringAttr.get(name)})
