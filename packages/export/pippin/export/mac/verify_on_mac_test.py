"""The check for a Mac, against an interpreter that stands in for Core ML: nothing here has seen a Mac."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from pippin.export.export_testing import TinyExport, tiny_export
from pippin.export.golden import golden_arrays
from pippin.export.mac import verify_on_mac as mac
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program
from pippin.export.package_runner import PackageRunner


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> TinyExport:
    return tiny_export(tmp_path_factory.mktemp("export"), compressed=True)


@pytest.fixture(scope="module")
def golden(export) -> dict[str, np.ndarray]:
    runner = PackageRunner(Interpreter(load_program(export.places.package), Mode.EXACT))
    runner.extend(list(range(24)))
    for token in (3, 4, 5):
        runner.extend([token])
    return golden_arrays(runner.calls, runner)


class StandInState:
    """What coremltools' MLState offers."""

    def __init__(self, arrays):
        self.arrays = arrays

    def read_state(self, name):
        return self.arrays[name]


class StandInModel:
    """What coremltools' MLModel offers, by the interpreter. It changes the dict that it is given, as that does."""

    def __init__(self, interpreter, function):
        self._interpreter, self._function = interpreter, function

    def make_state(self):
        return StandInState(self._interpreter.make_state())

    def predict(self, data, state=None):
        inputs = {name: data.pop(name) for name in list(data)}
        return self._interpreter.run(self._function, inputs, state.arrays)


def loader(export, mode, broken=()):
    program = load_program(export.places.package)

    def load(function, unit):
        if unit in broken:
            raise RuntimeError("Error -14: the plan cannot be built\nmore")
        return StandInModel(Interpreter(program, mode), function)

    return load


def test_what_was_recorded_comes_out_again(export, golden):
    result = mac.run_unit(golden, loader(export, Mode.EXACT), "CPU_ONLY", repeats=1)
    assert result.max_error < 2e-3  # the recorded logits are float16
    assert (result.tokens_equal, result.calls, result.state_error) == (5, 5, 0.0)
    assert result.prefill_ms > 0 and result.decode_ms > 0 and mac.passed(result, 2e-3)


def test_a_runtime_that_rounds_elsewhere_is_within_the_tolerance(export, golden):
    result = mac.run_unit(golden, loader(export, Mode.FLOAT16), "CPU_ONLY", repeats=1)
    assert 0 < result.max_error < mac.default_tolerance(golden) == 2e-2 and result.state_error < 1e-2


def test_a_unit_that_is_wrong_and_one_that_breaks_are_told(export, golden, tmp_path, capsys):
    wrong = {**golden, "logits_4": golden["logits_4"] + np.float16(1)}
    np.savez(tmp_path / "golden.npz", **wrong)
    arguments = [
        "--golden",
        str(tmp_path / "golden.npz"),
        "--units",
        "CPU_ONLY",
        "CPU_AND_GPU",
        "--repeats",
        "1",
    ]
    assert mac.main(arguments, loader(export, Mode.FLOAT16, broken=["CPU_AND_GPU"])) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("CPU_ONLY") and lines[1].endswith("FAILED") and "1.00e+00" in lines[1]
    assert lines[2].endswith("FAILED: RuntimeError: Error -14: the plan cannot be built")


def test_all_right_is_exit_code_0(export, golden, tmp_path, capsys):
    np.savez(tmp_path / "golden.npz", **golden)
    arguments = ["--golden", str(tmp_path / "golden.npz"), "--units", "ALL", "--repeats", "1"]
    assert mac.main(arguments, loader(export, Mode.FLOAT16)) == 0
    out = capsys.readouterr().out
    assert "prefill of 16" in out and "a logit may be off by 0.02" in out


def test_nan_is_no_small_error(export, golden):
    wrong = {**golden, "logits_0": np.full_like(golden["logits_0"], np.nan)}
    assert not mac.passed(mac.run_unit(wrong, loader(export, Mode.FLOAT16), "ALL", 1), 1e9)


def test_the_script_needs_nothing_but_numpy_and_coremltools():
    names = set()
    for node in ast.walk(ast.parse(Path(mac.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names - set(sys.stdlib_module_names) == {"numpy", "coremltools"}


def test_the_tolerance_grows_with_the_logits(golden):
    large = {**golden, "logits_0": np.full_like(golden["logits_0"], 39)}
    assert mac.default_tolerance(large) == mac.UNITS_OF_LAST_PLACE / 32
