"""The check for a Mac, against an interpreter that stands in for Core ML: nothing here has seen a Mac."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from pippin.export.adapter_files import adapter_path
from pippin.export.adapter_layout import adapter_file
from pippin.export.export_testing import TinyExport, tiny_export
from pippin.export.golden import golden_arrays
from pippin.export.mac import verify_on_mac as mac
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program
from pippin.export.output import read_manifest, replace_file
from pippin.export.package_runner import PackageRunner
from pippin.export.verification import read_adapter


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> TinyExport:
    return tiny_export(tmp_path_factory.mktemp("export"), compressed=True)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> TinyExport:
    """A package with room for adapters, and an adapter beside it."""
    export = tiny_export(tmp_path_factory.mktemp("adapted"), compressed=True, adapter_rank=2)
    layout = read_manifest(export.places).adapter
    flat = np.random.default_rng(0).normal(0, 0.2, layout.length).astype(np.float16)
    replace_file(adapter_path(export.places, "polite"), adapter_file(flat, layout))
    return export


def recorded(export: TinyExport, file: Path, adapter: str = "") -> dict[str, np.ndarray]:
    """What is recorded of a package, written to a file and read as on a Mac."""
    layout = read_manifest(export.places).adapter
    flat = read_adapter(adapter_path(export.places, adapter), layout) if adapter else None
    runner = PackageRunner(Interpreter(load_program(export.places.package), Mode.EXACT), flat)
    runner.extend(list(range(24)))
    for token in (3, 4, 5):
        runner.extend([token])
    np.savez(file, **golden_arrays(runner.calls, runner, adapter))
    return mac.recording(file, export.places.folder / "adapters")


@pytest.fixture(scope="module")
def golden(export, tmp_path_factory) -> dict[str, np.ndarray]:
    return recorded(export, tmp_path_factory.mktemp("golden") / "golden.npz")


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


def only(golden, load, unit: str, repeats: int = 1) -> mac.Result:
    """The result of one recording on one unit."""
    results, _ = mac.run_unit([golden], load, unit, repeats)
    return results[0]


def test_what_was_recorded_comes_out_again(export, golden):
    (result,), latency = mac.run_unit([golden], loader(export, Mode.EXACT), "CPU_ONLY", repeats=3)
    assert result.max_error < 2e-3  # the recorded logits are float16
    assert (result.tokens_equal, result.calls, result.state_error) == (5, 5, 0.0)
    assert mac.passed(result, 2e-3)
    assert latency is not None and latency.load_s >= 0
    assert {name: len(times) for name, times in latency.calls_ms.items()} == {"prefill": 3, "decode": 3}


def test_a_runtime_that_rounds_elsewhere_is_within_the_tolerance(export, golden):
    result = only(golden, loader(export, Mode.FLOAT16), "CPU_ONLY")
    assert 0 < result.max_error < mac.default_tolerance([golden]) == 2e-2 and result.state_error < 1e-2


def test_an_adapter_is_checked_beside_the_bare_model(adapted, tmp_path, capsys):
    bare = recorded(adapted, tmp_path / "golden.npz")
    polite = recorded(adapted, tmp_path / "golden_polite.npz", "polite")
    assert np.abs(bare["logits_0"].astype(np.float32) - polite["logits_0"]).max() > 0.05
    files = [str(tmp_path / name) for name in ("golden.npz", "golden_polite.npz")]
    given = ["--golden", *files, "--adapters", str(adapted.places.folder / "adapters"), "--repeats", "1"]
    assert mac.main([*given, "--units", "CPU_ONLY"], loader(adapted, Mode.FLOAT16)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["CPU_ONLY", "none"], ["CPU_ONLY", "polite"]]
    assert lines[1].endswith("ok") and lines[2].endswith("ok")
    # Without it, the logits are those of another model.
    wrong = {**polite, "adapter_values": np.zeros_like(polite["adapter_values"])}
    assert not mac.passed(only(wrong, loader(adapted, Mode.FLOAT16), "ALL"), 2e-2)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (bytes(64 + 6), r"polite\.bin has 70 bytes, not \d+\. "),
        (b"?", "has 1 bytes"),
        (None, "cannot be read: No such"),
    ],
)
def test_an_adapter_that_is_gone_or_another_is_told(adapted, tmp_path, capsys, data, told):
    np.savez(
        tmp_path / "golden_polite.npz", adapter=np.array([8], np.int32), adapter_name=np.array(["polite"])
    )
    if data is not None:
        (tmp_path / "polite.bin").write_bytes(data)
    given = ["--golden", str(tmp_path / "golden_polite.npz"), "--adapters", str(tmp_path)]
    with pytest.raises(SystemExit):
        mac.main(given, loader(adapted, Mode.EXACT))
    remedy = r"Put back the adapter that golden_polite\.npz was recorded with, or remove golden_polite\.npz"
    assert re.search(f"{told}.*{remedy}", capsys.readouterr().err)


@pytest.mark.parametrize("data", [b"", b"?", b"PK\x03\x04", None])
def test_a_file_that_is_no_recording_is_told(export, tmp_path, capsys, data):
    if data is not None:
        (tmp_path / "golden.npz").write_bytes(data)
    with pytest.raises(SystemExit):
        mac.main(["--golden", str(tmp_path / "golden.npz")], loader(export, Mode.EXACT))
    assert re.search(r"golden\.npz is no recording: .*Record it again", capsys.readouterr().err)


@pytest.mark.parametrize("repeats", ["0", "-3"])
def test_no_repeats_are_refused(export, golden, tmp_path, capsys, repeats):
    np.savez(tmp_path / "golden.npz", **golden)
    with pytest.raises(SystemExit):
        mac.main(
            ["--golden", str(tmp_path / "golden.npz"), f"--repeats={repeats}"], loader(export, Mode.EXACT)
        )
    assert f"--repeats is {repeats}; give how many calls are timed, 1 or more" in capsys.readouterr().err


class Apart(StandInModel):
    """A function that keeps a state of its own, whichever it is given."""

    def predict(self, data, state=None):
        self.own = getattr(self, "own", None) or self.make_state()
        return super().predict(data, self.own)


@pytest.mark.parametrize("alone", ["prefill", "decode"])
def test_states_that_the_functions_do_not_share_are_seen(export, golden, alone):
    program = load_program(export.places.package)

    def load(function, unit):
        return (Apart if function == alone else StandInModel)(Interpreter(program, Mode.FLOAT16), function)

    result = only(golden, load, "ALL")
    assert result.state_error > mac.STATE_TOLERANCE
    right = only(golden, loader(export, Mode.FLOAT16), "ALL")
    assert mac.passed(right, 2e-2) and right.state_error < mac.STATE_TOLERANCE / 10
    for error in (result.state_error, float("nan"), float("inf")):
        assert not mac.passed(dataclasses.replace(right, state_error=error), 2e-2)


def test_a_state_that_is_no_number_is_no_small_error(golden):
    arrays = {str(name): np.full((2, 2), np.nan, np.float16) for name in golden["states"]}
    assert mac.state_error(golden, StandInState(arrays)) == float("inf")


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
    assert [line.split()[0] for line in lines[5:]] == ["compute", "CPU_ONLY"]  # what broke has no times


def test_all_right_is_exit_code_0_and_a_table_of_latencies(export, golden, tmp_path, capsys):
    np.savez(tmp_path / "golden.npz", **golden)
    arguments = ["--golden", str(tmp_path / "golden.npz"), "--units", "ALL", "--repeats", "3"]
    assert mac.main(arguments, loader(export, Mode.FLOAT16)) == 0
    out = capsys.readouterr().out
    assert "a logit may be off by 0.02" in out
    assert "prefill of 16: P50" in out and "decode of 1: P50" in out and out.count("P99") == 2


def test_latencies_are_medians_and_99th_percentiles():
    times = [float(i) for i in range(1, 101)]
    (_, line) = mac.latency_table(
        [mac.Latency("ALL", 2.5, {"prefill": times, "decode": times})], 64
    ).splitlines()
    assert line.split() == [
        "ALL",
        "2.5",
        "s",
        "50.50",
        "ms",
        "99.01",
        "ms",
        "1267.3",
        "50.50",
        "ms",
        "99.01",
        "ms",
        "19.8",
    ]


def test_nan_is_no_small_error(export, golden):
    wrong = {**golden, "logits_0": np.full_like(golden["logits_0"], np.nan)}
    assert not mac.passed(only(wrong, loader(export, Mode.FLOAT16), "ALL"), 1e9)


def test_without_recordings_it_says_who_writes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mac, "__file__", str(tmp_path / "verify_on_mac.py"))
    with pytest.raises(SystemExit):
        mac.main([])
    assert "has no golden.npz: pippin's `verify --record` writes it" in capsys.readouterr().err


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
    assert mac.default_tolerance([large]) == mac.UNITS_OF_LAST_PLACE / 32
