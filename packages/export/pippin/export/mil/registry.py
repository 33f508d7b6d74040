"""The table of the operations that are interpreted."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pippin.export.mil.errors import PackageError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value while a program runs. Floats of any declared type are in the working type, float32 or float64."""

    values: np.ndarray
    dtype: str  # as the program means it: "float16"

    def item(self) -> Any:
        """The only value there is."""
        return self.values.item()

    def ints(self) -> list[int]:
        """The values of a vector of integers."""
        return [int(v) for v in np.ravel(self.values)]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one type of operation is computed."""

    function: Callable[..., Any]
    rounds: bool  # its results are new numbers; else they are those of its inputs
    takes_work: bool  # it wants to know the working type
    parameters: Mapping[str, bool]  # parameter -> whether it must be given


RULES: dict[str, Rule] = {}


def operation[F: Callable[..., Any]](name: str, *, rounds: bool = True) -> Callable[[F], F]:
    """Puts a function into the table. Its parameters are named as the operation's inputs are.

    It takes tensors, or lists of them, and returns one tensor or a list of them. A parameter `work` gets the working
    type of floats.

    Args:
        name: of the operation.
        rounds: whether it computes numbers, which are rounded to the declared type.
    """

    def put(function: F) -> F:
        parameters = inspect.signature(function).parameters
        wanted = {n: p.default is p.empty for n, p in parameters.items() if n != "work"}
        RULES[name] = Rule(function, rounds, "work" in parameters, wanted)
        return function

    return put


def rule(name: str) -> Rule:
    """The rule of an operation.

    Raises:
        PackageError: there is none.
    """
    if name not in RULES:
        raise PackageError(
            f"the operation {name!r} is not interpreted; these are: {', '.join(sorted(RULES))}. Export the model with these "
            "alone."
        )
    return RULES[name]


def same_dtype(*tensors: Tensor) -> str:
    """The type that all have.

    Raises:
        PackageError: they have several.
    """
    found = sorted({t.dtype for t in tensors})
    if len(found) != 1:
        raise PackageError(f"it takes values of one type, and got {' and '.join(found)}. Cast them before.")
    return found[0]


def is_set(flag: Tensor | None) -> bool:
    """Whether a parameter is given and true."""
    return flag is not None and bool(flag.item())
