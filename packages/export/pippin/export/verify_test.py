"""Verifying real packages of a tiny model: what passes, and what is refused."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pippin.core import manifest
from pippin.core.errors import PippinError
from pippin.export import verify
from pippin.export.adapter_files import adapter_path
from pippin.export.adapter_layout import adapter_file
from pippin.export.export_testing import CONTEXT, PREFILL, TinyExport, tiny_export
from pippin.export.golden import FILE, golden_arrays, golden_path
from pippin.export.mil.errors import PackageError
from pippin.export.mil.interpreter import Interpreter
from pippin.export.mil.messages import model_messages
from pippin.export.mil.spec import load_program
from pippin.export.output import MANIFEST, Places, read_manifest, replace_file, rewriting
from pippin.export.package_runner import PackageRunner, causal_mask
from pippin.export.verification import (
    EXACT_UNITS,
    FLOAT16_UNITS,
    Comparison,
    check_bytes,
    check_states,
    compare,
)
from pippin.export.verify_package import Request, verify_package
from pippin.v1 import export_pb2 as pb

_WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")
_MODEL = Path("Data", "com.apple.CoreML", "model.mlmodel")


@pytest.fixture(scope="module", params=[False, True], ids=["float16", "compressed"])
def export(request, tmp_path_factory) -> TinyExport:
    return tiny_export(tmp_path_factory.mktemp("export"), compressed=request.param)


@pytest.fixture
def copy(export, tmp_path) -> TinyExport:
    """The same, to be damaged."""
    root = export.places.package.parent
    shutil.copytree(root, tmp_path / "copy")
    return TinyExport(tmp_path / "copy" / "model", Places.of(tmp_path / "copy" / export.places.package.name))


def request(export: TinyExport, **changes: object) -> Request:
    model = str(export.model)
    asked = Request(package=export.places.package, model=model, steps=4)
    return dataclasses.replace(asked, **changes)


def test_a_package_is_its_model(export):
    report = verify_package(request(export, steps=32, perplexity_tokens=CONTEXT + 8))
    assert report.passed, report.text
    assert report.parity.max_logit_error < 2e-2 and report.parity.tokens_equal == 32
    change = re.search(r"perplexity of the package .*\(([-+].+)%\)", report.text)
    assert change is not None and abs(float(change[1])) < 1
    assert "all checks passed; a prompt of 24 tokens" in report.text


def test_the_command_tells_by_its_exit_code(export, capsys):
    given = [str(export.places.package), "--model", str(export.model), "--steps", "2", "--mode", "exact"]
    assert verify.main(given) == 0
    assert "exact: greedy tokens" in capsys.readouterr().out
    assert verify.main([*given[:2], str(export.model / "none"), *given[3:]]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("file", [_WEIGHTS, _MODEL, Path("Manifest.json")])
def test_a_flipped_bit_is_refused_and_named(copy, file, capsys):
    path = copy.places.package / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify.main([str(copy.places.package), "--model", str(copy.model)]) == 1
    assert f"tiny.mlpackage/{file.as_posix()}: does not match its SHA-256" in capsys.readouterr().err


def test_a_file_that_is_not_in_the_manifest_fails(copy):
    (copy.places.package / "Data" / "more.bin").write_bytes(b"?")
    report = verify_package(request(copy))
    assert not report.passed and "not in the manifest: tiny.mlpackage/Data/more.bin" in report.text


def rewritten(export: TinyExport, change) -> pb.ExportManifest:
    """The manifest, changed by who has the right to."""
    message = manifest.read_manifest(export.places.folder, pb.ExportManifest, MANIFEST)
    change(message)
    root = export.places.package.parent
    for file in message.files:
        file.CopyFrom(manifest.describe_file(root, root / file.path))
    manifest.write_manifest(export.places.folder, message, MANIFEST)
    return message


def test_weights_that_are_others_are_found_though_all_digests_are_right(copy):
    """Whoever can write the manifest too can fool its digests, not the comparison with the model."""
    path = copy.places.package / _WEIGHTS
    program = load_program(copy.places.package)
    (file,) = program.weight_files.values()
    largest = max(file.blobs(), key=lambda blob: blob.num_bytes)
    data = bytearray(path.read_bytes())
    data[largest.data_offset : largest.data_offset + 200] = bytes(200)
    path.write_bytes(data)
    rewritten(copy, lambda message: None)
    report = verify_package(request(copy))
    assert not report.passed and "exact: largest error of a logit" in report.text


def test_claims_of_other_sizes_fail(copy):
    def change(message):
        message.context_length = 2 * CONTEXT
        message.weights[0].bytes += 1 << 20

    message = rewritten(copy, change)
    program = load_program(copy.places.package)
    num_bytes = sum(map(len, program.weight_files.values()))
    assert not check_bytes(num_bytes, message).passed
    report = verify_package(request(copy))
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == ["sizes of the functions", "bytes of weight files"]


def test_another_model_is_no_reference(export, tmp_path):
    other = tiny_export(tmp_path, compressed=False, seed=1)
    with pytest.raises(PippinError, match="Give the model that was exported"):
        verify_package(request(export, model=str(other.model)))


def test_a_package_without_its_folder_is_refused(tmp_path):
    with pytest.raises(PippinError, match="is no package: there is no such folder"):
        verify_package(Request(tmp_path / "x.mlpackage", "m"))
    (tmp_path / "x.mlpackage").mkdir()
    with pytest.raises(manifest.DamageError, match="export_manifest.textproto: is absent"):
        verify_package(Request(tmp_path / "x.mlpackage", "m"))


def test_too_many_steps_for_the_caches_are_refused(export):
    with pytest.raises(
        PippinError, match=rf"{CONTEXT} steps do not fit behind a prompt in caches of {CONTEXT} tokens"
    ):
        verify_package(request(export, steps=CONTEXT))


def test_a_state_that_is_written_twice_is_named(copy):
    path = copy.places.package / _MODEL
    model = model_messages().Model()
    model.ParseFromString(path.read_bytes())
    function = model.mlProgram.functions["decode"]
    operations = function.block_specializations[function.opset].operations
    write = next(o for o in operations if o.type in ("write_state", "coreml_update_state"))
    again = operations.add()
    again.CopyFrom(write)
    for output in again.outputs:
        output.name += "_again"
    path.write_bytes(model.SerializeToString())
    check = check_states(load_program(copy.places.package))
    assert not check.passed and "decode: " in check.found and "written 2" in check.found


def test_the_bound_of_float16_grows_with_the_logits():
    def bound(units: int, largest: float) -> float:
        return Comparison("", units, 0.0, largest, 0, 0, "").bound

    assert bound(FLOAT16_UNITS, 3.9) == bound(EXACT_UNITS, 31.0) == 2e-2
    assert bound(FLOAT16_UNITS, 39.0) == FLOAT16_UNITS / 32
    assert bound(EXACT_UNITS, 39.0) == 1 / 32


def test_what_is_recorded_lies_in_the_manifest_and_is_read_back(copy):
    report = verify_package(request(copy, record=True))
    assert report.passed
    message = read_manifest(copy.places)  # digests of the new files too
    assert {f"tiny/{FILE}", "tiny/verify_on_mac.py"} <= {file.path for file in message.files}
    assert message.parity == report.parity
    assert verify_package(request(copy, record=True)).passed  # again, over the first
    with np.load(copy.places.folder / FILE, allow_pickle=False) as golden:
        assert golden["functions"].tolist() == ["prefill"] * 2 + ["decode"] * 4
        assert golden["tokens"].tolist() == [PREFILL, PREFILL // 2, 1, 1, 1, 1]
        assert golden["position"].tolist() == [0, 16, 24, 25, 26, 27]
        assert golden["logits_0"].shape == (96,) and golden["logits_0"].dtype == np.float16


def test_what_the_export_measured_and_a_record_did_not_stays(copy):
    with rewriting(copy.places, []) as message:
        message.parity.perplexity_before, message.parity.perplexity_after = 9.0, 10.0
    assert verify_package(request(copy, record=True)).passed
    found = read_manifest(copy.places).parity
    assert (found.perplexity_before, found.perplexity_after, found.decode_steps) == (9.0, 10.0, 4)


def test_an_export_that_is_no_package_is_told_as_such(copy):
    with rewriting(copy.places, []) as message:
        message.target = "gguf"
    with pytest.raises(
        PippinError, match="it is for gguf, and this command runs packages of Core ML and Core AI"
    ):
        verify_package(request(copy))


def test_both_modes_are_needed_to_record(export):
    with pytest.raises(PippinError, match="Leave --mode out, or make it both"):
        verify_package(request(export, mode="exact", record=True))


def test_golden_vectors_are_the_same_each_time(export):
    program = load_program(export.places.package)
    arrays = []
    for _ in range(2):
        runner = PackageRunner(Interpreter(program))
        runner.extend([5, 6, 7])
        arrays.append(golden_arrays(runner.calls, runner))
    for name, values in arrays[0].items():
        np.testing.assert_array_equal(values, arrays[1][name])


def test_a_text_longer_than_the_caches_is_refused(export):
    runner = PackageRunner(Interpreter(load_program(export.places.package)))
    runner.extend([1] * (CONTEXT - 1))
    with pytest.raises(PackageError, match="tokens 63 to 78 do not fit in caches of 64"):
        runner.extend([1, 2])
    assert runner.extend([3]).shape == (1, 96)


def test_the_mask_of_padding_is_that_of_tokens_to_come():
    mask = causal_mask(2, 2, 5)
    assert mask.shape == (1, 1, 2, 5) and mask.dtype == np.float16
    assert (mask[0, 0] == 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False]]


@pytest.fixture(scope="module")
def with_room(tmp_path_factory) -> TinyExport:
    """A package that takes adapters of rank 4."""
    return tiny_export(tmp_path_factory.mktemp("export"), compressed=True, adapter_rank=4)


def test_an_adapter_is_its_model_with_more_in_its_weights(with_room, tmp_path):
    layout = read_manifest(with_room.places).adapter
    flat = np.random.default_rng(0).normal(0, 0.2, layout.length).astype(np.float16)
    (tmp_path / "some.bin").write_bytes(adapter_file(flat, layout))
    report = verify_package(request(with_room, adapter=tmp_path / "some.bin", steps=8))
    assert report.passed, report.text
    bare, adapted = (
        PackageRunner(Interpreter(load_program(with_room.places.package)), given).extend([1, 2, 3])
        for given in (None, flat)
    )
    assert np.abs(bare - adapted).max() > 0.05


def test_an_adapter_is_recorded_beside_the_bare_model(with_room, tmp_path):
    root = with_room.places.package.parent
    shutil.copytree(root, tmp_path / "copy")
    copy = TinyExport(
        tmp_path / "copy" / "model", Places.of(tmp_path / "copy" / with_room.places.package.name)
    )
    layout = read_manifest(copy.places).adapter
    flat = np.random.default_rng(0).normal(0, 0.2, layout.length).astype(np.float16)
    path = adapter_path(copy.places, "polite")
    replace_file(path, adapter_file(flat, layout))
    bare = verify_package(request(copy, record=True))
    assert bare.passed and verify_package(request(copy, record=True, adapter=path)).passed
    message = read_manifest(copy.places)
    assert {f"tiny/{FILE}", "tiny/golden_polite.npz"} <= {file.path for file in message.files}
    assert message.parity == bare.parity  # what it says is of the bare model
    with (
        np.load(golden_path(copy.places), allow_pickle=False) as without,
        np.load(golden_path(copy.places, "polite"), allow_pickle=False) as golden,
    ):
        assert golden["adapter_name"].tolist() == ["polite"] and "adapter_name" not in without
        assert np.abs(golden["logits_0"].astype(np.float32) - without["logits_0"]).max() > 0.05


def test_what_others_wrote_while_it_ran_stays(with_room, tmp_path, monkeypatch):
    root = with_room.places.package.parent
    shutil.copytree(root, tmp_path / "copy")
    copy = TinyExport(
        tmp_path / "copy" / "model", Places.of(tmp_path / "copy" / with_room.places.package.name)
    )
    layout = read_manifest(copy.places).adapter
    path = adapter_path(copy.places, "polite")
    replace_file(path, adapter_file(np.zeros(layout.length, np.float16), layout))

    def meanwhile(*args, **kwargs):
        with rewriting(copy.places, [path]) as message:
            message.parity.perplexity_after = 9.0
        return compare(*args, **kwargs)

    monkeypatch.setattr("pippin.export.verify_package.compare", meanwhile)
    assert verify_package(request(copy, record=True, adapter=path)).passed
    message = read_manifest(copy.places)
    assert message.parity.perplexity_after == 9.0
    assert {"tiny/adapters/polite.bin", "tiny/golden_polite.npz"} <= {file.path for file in message.files}


def test_recording_that_is_killed_leaves_a_package_that_can_be_recorded(copy, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, data):
        replace_file(path, data)
        raise Killed

    assert verify_package(request(copy, record=True)).passed
    with monkeypatch.context() as patch:
        patch.setattr("pippin.export.golden.replace_file", killed)
        with pytest.raises(Killed):
            verify_package(request(copy, record=True, steps=5))
    assert "tiny/golden.npz" not in {file.path for file in read_manifest(copy.places).files}
    assert verify_package(request(copy, record=True)).passed
    assert "tiny/golden.npz" in {file.path for file in read_manifest(copy.places).files}


def test_an_adapter_of_another_size_is_refused(export, with_room, tmp_path):
    (tmp_path / "some.bin").write_bytes(bytes(6))
    for package in (export, with_room):
        with pytest.raises(PippinError, match="has 6 bytes; this package takes"):
            verify_package(request(package, adapter=tmp_path / "some.bin"))
    with pytest.raises(PippinError, match="cannot be read"):
        verify_package(request(export, adapter=tmp_path / "none.bin"))
    with pytest.raises(PippinError, match="there is no --perplexity, which is of the bare model"):
        verify_package(request(export, adapter=tmp_path / "some.bin", perplexity_tokens=8))
    with pytest.raises(PippinError, match="is for adapters beside the package"):
        verify_package(request(export, adapter=tmp_path / "some.bin", record=True))


def test_an_adapter_of_another_model_of_the_same_sizes_is_refused(with_room, tmp_path):
    layout = pb.AdapterLayout()
    layout.CopyFrom(read_manifest(with_room.places).adapter)
    layout.base_signature = "0" * 64
    (tmp_path / "some.bin").write_bytes(adapter_file(np.zeros(layout.length, np.float16), layout))
    with pytest.raises(
        PippinError, match="is for the model with the signature 000000000000; this package holds"
    ):
        verify_package(request(with_room, adapter=tmp_path / "some.bin"))


def test_the_swift_package_and_the_manifest_agree(with_room):
    exported = read_manifest(with_room.places)
    facts = (with_room.places.folder / "swift/Sources/PippinModel/ModelFacts.swift").read_text()
    assert f"adapterLength = {exported.adapter.length}" in facts and f'"{exported.model_signature}"' in facts
    assert "tiny/swift/Package.swift" in {file.path for file in exported.files}
