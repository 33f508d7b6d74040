"""A program as it lies in a package: functions of operations over named values."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pippin.export.mil.blob import BlobFile


@dataclasses.dataclass(frozen=True)
class TensorType:
    """The type of a value."""

    dtype: str  # a name of pippin.export.mil.dtypes
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class BlobPlace:
    """Where a constant lies."""

    file: str  # a key of Program.weight_files
    offset: int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that the program knows."""

    type: TensorType
    value: np.ndarray | str | BlobPlace

    @property
    def key(self) -> object:
        """Equal where two constants surely are: what is made of them is made once."""
        if isinstance(self.value, BlobPlace):
            return self.value, self.type
        return (self.value if isinstance(self.value, str) else self.value.tobytes()), self.type


@dataclasses.dataclass(frozen=True)
class Operation:
    """One step of a function."""

    type: str
    inputs: Mapping[str, tuple[str | Constant, ...]]  # parameter -> names of values, or constants
    outputs: tuple[tuple[str, TensorType], ...]

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.type} {self.outputs[0][0]!r}" if self.outputs else self.type


@dataclasses.dataclass(frozen=True)
class Function:
    """What a package can be asked to compute."""

    name: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    constants: Mapping[str, Constant]
    operations: tuple[Operation, ...]
    outputs: Mapping[str, TensorType]


@dataclasses.dataclass(frozen=True)
class Program:
    """All of a package."""

    path: Path
    functions: Mapping[str, Function]
    weight_files: Mapping[str, BlobFile]  # as programs name them: "@model_path/weights/weight.bin"
    metadata: Mapping[str, str]  # of the user

    @property
    def blobs(self) -> frozenset[BlobPlace]:
        """The blobs that the functions name."""
        constants = [c for f in self.functions.values() for c in f.constants.values()]
        for function in self.functions.values():
            for operation in function.operations:
                for values in operation.inputs.values():
                    constants += [v for v in values if isinstance(v, Constant)]
        return frozenset(c.value for c in constants if isinstance(c.value, BlobPlace))
