"""Packages for tests, written by coremltools itself, and what its operations give."""

import contextlib
import dataclasses
import gc
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pippin.export.coreml_tools import Builder as mb
from pippin.export.coreml_tools import ct, mil, nptype_from_builtin, string_to_builtin, types
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program

_TYPES = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}


def save_package(
    path: Path, functions: Mapping[str, tuple[Mapping[str, Any], Callable[..., Any]]], default: str = ""
) -> Path:
    """Writes a package, without any of the passes that rewrite a program.

    Args:
        path: of the .mlpackage.
        functions: name -> specs of inputs by name (see `tensor`, `state`), and what emits the body of their values.
        default: the function that runs where none is named; the only one, or the first.
    """
    program = mil.Program()
    for name, (inputs, body) in functions.items():
        placeholders = {
            key: mb.placeholder(*spec) if isinstance(spec, tuple) else mb.state_tensor_placeholder(*spec)
            for key, spec in inputs.items()
        }
        with mil.Function(placeholders, opset_version=ct.target.iOS18) as function:
            outputs = body(**function.inputs)
            function.set_outputs(list(outputs) if isinstance(outputs, tuple | list) else [outputs])
            program.add_function(name, function)
    program.default_function_name = default or next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    # Its folder of scraps is dropped with it, which warns; and it draws bars.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", ResourceWarning)
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        model.save(str(path))
        del model
        gc.collect()
    return path


def tensor(dtype: str, *shape: int) -> tuple[tuple[int, ...], Any]:
    """The spec of an input."""
    return shape, _TYPES[dtype]


def state(*shape: int) -> list[Any]:
    """The spec of a state of float16."""
    return [shape, types.fp16]


def sub_byte(values: np.ndarray, dtype: str) -> np.ndarray:
    """Integers as coremltools knows those of less than a byte: "uint4"."""
    return values.astype(nptype_from_builtin(string_to_builtin(dtype)))


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation, what goes in, and what must come out."""

    operation: str
    inputs: Mapping[str, np.ndarray]  # those that a caller gives
    expected: np.ndarray | Sequence[np.ndarray]
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those that the program knows

    @property
    def results(self) -> list[np.ndarray]:
        return [self.expected] if isinstance(self.expected, np.ndarray) else list(self.expected)


def check_cases(folder: Path, cases: Sequence[Case], tolerance: float = 1e-12) -> None:
    """Builds a package of all cases, and sees that both modes give what is expected.

    `EXACT` must be within `tolerance` relative; `FLOAT16` within one unit of the last place of float16.
    """
    specs: dict[str, Any] = {}
    given: dict[str, np.ndarray] = {}
    for i, case in enumerate(cases):
        for key, values in case.inputs.items():
            array = values.astype(np.int32) if values.dtype == bool else values
            given[f"case_{i}_{key}"] = array
            specs[f"case_{i}_{key}"] = tensor(array.dtype.name, *array.shape)

    def body(**inputs: Any) -> list[Any]:
        outputs = []
        for i, case in enumerate(cases):
            values = {}
            for key, array in case.inputs.items():
                value = inputs[f"case_{i}_{key}"]
                values[key] = mb.cast(x=value, dtype="bool") if array.dtype == bool else value
            if "values" in case.parameters:  # names of inputs, in order
                values = {"values": [values[n] for n in case.parameters["values"]]}
            others = {k: v for k, v in case.parameters.items() if k != "values"}
            made = getattr(mb, case.operation)(**values, **others)
            for j, var in enumerate(made if isinstance(made, list | tuple) else [made]):
                wide = (
                    var
                    if var.dtype in (types.fp16, types.fp32, types.int32)
                    else mb.cast(x=var, dtype="int32")
                )
                outputs.append(mb.identity(x=wide, name=f"case_{i}_out_{j}"))
        return outputs

    program = load_program(save_package(folder / "cases.mlpackage", {"main": (specs, body)}))
    for mode in Mode:
        got = Interpreter(program, mode).run("main", given, {})
        for i, case in enumerate(cases):
            for j, want in enumerate(case.results):
                result = got[f"case_{i}_out_{j}"]
                label = f"{case.operation} {dict(case.parameters)} {mode.value} output {j}"
                assert result.shape == want.shape, label
                bound = tolerance if mode is Mode.EXACT else 2.0**-10
                np.testing.assert_allclose(
                    result.astype(np.float64),
                    want.astype(np.float64),
                    rtol=bound,
                    atol=bound * 1e-1,
                    err_msg=label,
                )
