"""Runs the functions of a saved package, states included, with NumPy.

How numbers are rounded, in the mode `FLOAT16`: every operation takes numbers of the declared type, float16, computes
in float32 with sums in the order of the machine's BLAS, and rounds its result once to the declared type. In the mode
`EXACT` nothing is rounded between operations, which compute in float64, but what is stored: constants and states have
their declared types. The first is a model of a good float16 device, not of one: devices differ in where they round.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pippin.export.mil import dtypes
from pippin.export.mil import (
    ops_activation as _activation,  # noqa: F401  puts its operations into the table, as the next do
)
from pippin.export.mil import ops_elementwise as _elementwise  # noqa: F401
from pippin.export.mil import ops_gather as _gather  # noqa: F401
from pippin.export.mil import ops_linear as _linear  # noqa: F401
from pippin.export.mil import ops_reduction as _reduction  # noqa: F401
from pippin.export.mil import ops_shape as _shape  # noqa: F401
from pippin.export.mil.errors import PackageError
from pippin.export.mil.ops_constexpr import PREFIX
from pippin.export.mil.program import Constant, Function, Operation, Program, TensorType
from pippin.export.mil.registry import Rule, Tensor, rule
from pippin.export.mil.weights import ConstantReader, TensorCache

type State = dict[str, np.ndarray]  # name -> values of the declared type

_READ_STATE, _UPDATE_STATE, _WRITE_STATE = "read_state", "coreml_update_state", "write_state"
_STATE_OPERATIONS = {
    _READ_STATE: ("input",),
    _UPDATE_STATE: ("state", "value"),
    _WRITE_STATE: ("input", "data"),
}
_MAX_CACHED_BYTES = 4 << 30
# What NumPy, and the lack of a value, raise where a program asks for what cannot be.
_CANNOT = (ValueError, LookupError, TypeError, ArithmeticError, MemoryError)


class Mode(enum.Enum):
    """How numbers are rounded: see the module."""

    FLOAT16 = "float16"
    EXACT = "exact"


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operation, made ready."""

    operation: Operation
    rule: Rule | None  # None: of a state
    dead: tuple[str, ...]  # values that none behind it uses


@dataclasses.dataclass(frozen=True)
class _Plan:
    function: Function
    steps: tuple[_Step, ...]
    constants: Mapping[str, tuple[Operation, int]]  # of a compressed constant: what makes it, as which output


class Interpreter:
    """Runs a package."""

    def __init__(
        self, program: Program, mode: Mode = Mode.FLOAT16, *, max_cached_bytes: int = _MAX_CACHED_BYTES
    ):
        """
        Args:
            program: from `load_program`.
            mode: how numbers are rounded.
            max_cached_bytes: of weights that are kept as numbers of the working type.

        Raises:
            PackageError: an operation is not interpreted, or has inputs that it does not take.
        """
        self.program, self.mode = program, mode
        self._work = np.dtype(np.float32 if mode is Mode.FLOAT16 else np.float64)
        self._reader = ConstantReader(program.weight_files, self._work)
        self._cache = TensorCache(max_cached_bytes)
        self._plans = {name: _plan(function) for name, function in program.functions.items()}

    def make_state(self) -> State:
        """The states of all functions, which share those of one name, filled with zeros.

        Raises:
            PackageError: functions have states of one name and of several types.
        """
        types: dict[str, TensorType] = {}
        for function in self.program.functions.values():
            for name, kind in function.states.items():
                if types.setdefault(name, kind) != kind:
                    raise PackageError(
                        f"the state {name!r} is {types[name]} in one function and {kind} in another. Export them with one."
                    )
        return {n: np.zeros(t.shape, dtypes.BY_NAME[t.dtype].storage) for n, t in types.items()}

    def run(self, function: str, inputs: Mapping[str, np.ndarray], state: State) -> dict[str, np.ndarray]:
        """The outputs of a function, by name. States change in place.

        Args:
            function: its name.
            inputs: by name, of the declared types and shapes.
            state: from `make_state`, or from runs before.

        Returns:
            Arrays of the declared types; in the mode `EXACT` floats are float64.

        Raises:
            PackageError: the inputs are not those declared, or an operation cannot be computed or gives something else
                than is declared.
        """
        if function not in self._plans:
            raise PackageError(
                f"{self.program.path} has no function {function!r}. Run one of: {', '.join(self._plans)}."
            )
        plan = self._plans[function]
        with np.errstate(all="ignore"):  # infinities and NaN are what float16 gives
            values = self._inputs(plan.function, inputs)
            for step in plan.steps:
                try:
                    results = self._compute(step, plan, values, state)
                except _CANNOT as e:
                    raise PackageError(f"in the function {function!r}, {step.operation.name}: {e}") from e
                values |= _declared(results, step.operation, function)
                for name in step.dead:
                    values.pop(name, None)
            return {name: self._output(self._value(name, plan, values)) for name in plan.function.outputs}

    def _inputs(self, function: Function, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        if inputs.keys() != function.inputs.keys():
            raise PackageError(
                f"the function {function.name!r} takes {_names(function.inputs)}, and got {_names(inputs)}. Give these."
            )
        values = {}
        for name, kind in function.inputs.items():
            array = np.asarray(inputs[name])
            if array.shape != kind.shape or array.dtype != dtypes.BY_NAME[kind.dtype].storage:
                raise PackageError(
                    f"the input {name!r} of {function.name!r} is {kind}, and got {array.dtype}{list(array.shape)}. Give an "
                    "array of this type."
                )
            is_float = dtypes.is_float(kind.dtype)
            values[name] = Tensor(array.astype(self._work) if is_float else array, kind.dtype)
        return values

    def _compute(self, step: _Step, plan: _Plan, values: dict[str, Tensor], state: State) -> list[Tensor]:
        if step.rule is None:
            return self._of_state(step.operation, plan, values, state)
        arguments = {
            parameter: self._argument(parameter, names, lambda name: self._value(name, plan, values))
            for parameter, names in step.operation.inputs.items()
        }
        return self._applied(step.rule, arguments)

    def _applied(self, rule: Rule, arguments: dict[str, Any]) -> list[Tensor]:
        results = rule.function(**arguments, **({"work": self._work} if rule.takes_work else {}))
        results = results if isinstance(results, list) else [results]
        if not rule.rounds or self.mode is Mode.EXACT:
            return results
        return [self._rounded(t) for t in results]

    def _argument(
        self, parameter: str, names: tuple[str | Constant, ...], value: Callable[[str | Constant], Tensor]
    ) -> Tensor | list[Tensor]:
        tensors = [value(name) for name in names]
        return tensors if parameter == "values" else tensors[0]

    def _value(self, name: str | Constant, plan: _Plan, values: Mapping[str, Tensor]) -> Tensor:
        if isinstance(name, str):
            if name in values:
                return values[name]
            if name in plan.constants:
                operation, which = plan.constants[name]
                return self._compressed(operation, plan)[which]
            name = plan.function.constants[name]
        constant = name
        return self._cache.get(constant.key, lambda: [self._reader.read(constant)])[0]

    def _compressed(self, operation: Operation, plan: _Plan) -> list[Tensor]:
        """What a compressed constant stands for, in the declared type in every mode."""

        def stored(name: str | Constant) -> Tensor:
            if isinstance(name, str) and name in plan.constants:
                inner, which = plan.constants[name]
                return self._compressed(inner, plan)[which]
            return self._reader.read(plan.function.constants[name] if isinstance(name, str) else name)

        def make() -> list[Tensor]:
            arguments = {p: self._argument(p, names, stored) for p, names in operation.inputs.items()}
            try:
                results = self._applied(rule(operation.type), arguments)
            except _CANNOT as e:
                raise PackageError(f"{operation.name}: {e}") from e
            declared = _declared(results, operation, plan.function.name)
            return [self._rounded(tensor) for tensor in declared.values()]

        return self._cache.get(_key(operation, plan), make)

    def _of_state(
        self, operation: Operation, plan: _Plan, values: dict[str, Tensor], state: State
    ) -> list[Tensor]:
        parameters = _STATE_OPERATIONS[operation.type]
        name = operation.inputs[parameters[0]][0]
        if not isinstance(name, str) or name not in plan.function.states:
            raise PackageError(f"{name!r} is no state of the function.")
        kind = plan.function.states[name]
        if name not in state or state[name].shape != kind.shape:
            raise PackageError(f"the state {name!r} is {kind}, and the one given is not. Use make_state().")
        if operation.type != _READ_STATE:
            tensor = self._value(operation.inputs[parameters[1]][0], plan, values)
            if tensor.dtype != kind.dtype or tensor.values.shape != kind.shape:
                raise PackageError(
                    f"it writes {tensor.dtype}{list(tensor.values.shape)} into the state {name!r}, which is {kind}."
                )
            state[name] = tensor.values.astype(dtypes.BY_NAME[kind.dtype].storage)
            if operation.type == _WRITE_STATE:
                return []
        is_float = dtypes.is_float(kind.dtype)
        return [Tensor(state[name].astype(self._work) if is_float else state[name], kind.dtype)]

    def _rounded(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == "float16":
            return Tensor(tensor.values.astype(np.float16).astype(self._work), tensor.dtype)
        if dtypes.is_float(tensor.dtype):
            return Tensor(tensor.values.astype(self._work, copy=False), tensor.dtype)
        return tensor

    def _output(self, tensor: Tensor) -> np.ndarray:
        exact = self.mode is Mode.EXACT and dtypes.is_float(tensor.dtype)
        return tensor.values if exact else tensor.values.astype(dtypes.BY_NAME[tensor.dtype].storage)


def _declared(results: list[Tensor], operation: Operation, function: str) -> dict[str, Tensor]:
    """The results of an operation by name, if they are what the program declares."""
    computed = [TensorType(t.dtype, t.values.shape) for t in results]
    declared = [kind for _, kind in operation.outputs]
    if computed != declared:
        raise PackageError(
            f"in the function {function!r}, {operation.name} is declared {', '.join(map(str, declared))}, and computes "
            f"{', '.join(map(str, computed))}. The package is damaged, or its writer wrong: export it again."
        )
    return {name: tensor for (name, _), tensor in zip(operation.outputs, results, strict=True)}


def _plan(function: Function) -> _Plan:
    constants: dict[str, tuple[Operation, int]] = {}
    steps: list[tuple[Operation, Rule | None]] = []
    for operation in function.operations:
        if operation.type in _STATE_OPERATIONS:
            steps.append((operation, None))
            continue
        found = rule(operation.type)
        _check_parameters(operation, found)
        if operation.type.startswith(PREFIX):
            for name in (n for names in operation.inputs.values() for n in names if isinstance(n, str)):
                if name not in function.constants and name not in constants:
                    raise PackageError(
                        f"{operation.name} takes {name!r}, which only a run knows: it is no constant. Export it again."
                    )
            constants |= {name: (operation, i) for i, (name, _) in enumerate(operation.outputs)}
        else:
            steps.append((operation, found))
    return _Plan(function, tuple(_with_deaths(steps, set(function.outputs))), constants)


def _with_deaths(steps: list[tuple[Operation, Rule | None]], kept: set[str]) -> list[_Step]:
    result = []
    used = set(kept)
    for operation, found in reversed(steps):
        names = {n for values in operation.inputs.values() for n in values if isinstance(n, str)}
        names |= {name for name, _ in operation.outputs}
        result.append(_Step(operation, found, tuple(sorted(names - used))))
        used |= names
    return result[::-1]


def _check_parameters(operation: Operation, found: Rule) -> None:
    missing = sorted(n for n, needed in found.parameters.items() if needed and n not in operation.inputs)
    unknown = sorted(operation.inputs.keys() - found.parameters.keys())
    if missing or unknown:
        raise PackageError(
            f"{operation.name} has {_names(operation.inputs)}; as iOS 18 defines it, it takes {_names(found.parameters)}. "
            "Export it for iOS 18."
        )
    for parameter, names in operation.inputs.items():
        if parameter != "values" and len(names) != 1:
            raise PackageError(f"{operation.name} has {len(names)} values for {parameter!r}; it takes one.")


def _key(operation: Operation, plan: _Plan) -> object:
    """Equal where two functions decompress the same constant."""

    def of(name: str | Constant) -> object:
        if isinstance(name, str) and name in plan.constants:
            inner, which = plan.constants[name]
            return _key(inner, plan), which
        return (plan.function.constants[name] if isinstance(name, str) else name).key

    return operation.type, tuple((p, *map(of, names)) for p, names in sorted(operation.inputs.items()))


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(sorted(mapping)) or "nothing"
