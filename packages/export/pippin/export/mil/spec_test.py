"""Packages on disk: what leads out of them, or says something else than it holds, is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from pippin.export.coreml_tools import Builder as mb
from pippin.export.mil.errors import PackageError
from pippin.export.mil.messages import model_messages
from pippin.export.mil.spec import load_program
from pippin.export.mil.testing import save_package, tensor


@pytest.fixture
def package(tmp_path):
    def body(x):
        return mb.add(x=x, y=np.arange(16, dtype=np.float16), name="y")

    return save_package(tmp_path / "p.mlpackage", {"main": ({"x": tensor("float16", 16)}, body)})


def model_file(package):
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def edit(package, change) -> None:
    model = model_messages().Model()
    model.ParseFromString(model_file(package).read_bytes())
    change(model)
    model_file(package).write_bytes(model.SerializeToString())


def constant(model):
    function = model.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    return next(o for o in operations if o.type == "const" and o.attributes["val"].HasField("blobFileValue"))


def test_a_package_is_read_without_importing_coremltools():
    program = (
        "import sys; from pippin.export.mil.messages import model_messages; from pippin.export.mil import spec; "
        "model_messages().Model(); assert not [m for m in sys.modules if m.split('.')[0] in ('coremltools', 'jax')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_user_metadata_is_read(package):
    edit(package, lambda m: m.description.metadata.userDefined.update({"contextLength": "512"}))
    assert load_program(package).metadata["contextLength"] == "512"


def test_what_is_no_package_is_named(tmp_path):
    with pytest.raises(PackageError, match="is no package: it has no Manifest.json"):
        load_program(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"rootModelIdentifier": "x", "itemInfoEntries": {}}'])
def test_a_manifest_that_names_no_model_is_refused(package, content):
    (package / "Manifest.json").write_text(content)
    with pytest.raises(PackageError, match="does not name the model"):
        load_program(package)


@pytest.mark.parametrize("path", ["../../model.mlmodel", "/etc/passwd", "", 7])
def test_a_manifest_does_not_lead_out_of_the_package(package, path):
    content = {"rootModelIdentifier": "x", "itemInfoEntries": {"x": {"path": path}}}
    (package / "Manifest.json").write_text(json.dumps(content))
    with pytest.raises(PackageError, match="is no path in"):
        load_program(package)


@pytest.mark.parametrize(
    "name", ["@model_path/../../../weight.bin", "@model_path//etc/passwd", "weights/weight.bin"]
)
def test_a_constant_does_not_lead_out_of_the_package(package, name):
    edit(package, lambda m: setattr(constant(m).attributes["val"].blobFileValue, "fileName", name))
    with pytest.raises(PackageError, match="Do not use this package"):
        load_program(package)


def test_a_constant_of_another_size_than_its_blob_is_refused(package):
    def change(model):
        constant(model).attributes["val"].type.tensorType.dimensions[0].constant.size = 17

    edit(package, change)
    with pytest.raises(
        PackageError, match=r"is declared float16\[17\], but the blob at 64 .* 16 values of float16"
    ):
        load_program(package)


def test_an_older_set_of_operations_is_refused(package):
    edit(package, lambda m: setattr(m.mlProgram.functions["main"], "opset", "CoreML5"))
    with pytest.raises(
        PackageError, match="is for the operations 'CoreML5'; those of iOS 18 are interpreted"
    ):
        load_program(package)


def test_a_flexible_shape_is_refused(package):
    def change(model):
        model.mlProgram.functions["main"].inputs[0].type.tensorType.dimensions[0].unknown.variadic = False

    edit(package, change)
    with pytest.raises(PackageError, match="'x' has a dim of unknown size"):
        load_program(package)


def test_another_kind_of_model_is_refused(package):
    edit(package, lambda m: m.neuralNetwork.SetInParent())
    with pytest.raises(PackageError, match="of the kind neuralNetwork, not an mlProgram"):
        load_program(package)


def test_a_model_that_was_cut_is_refused(package):
    whole = model_file(package).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        model_file(package).write_bytes(whole[:size])
        with pytest.raises(PackageError):
            load_program(package)


def test_no_flipped_byte_of_a_model_breaks_the_reader(package):
    whole = model_file(package).read_bytes()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x15
        model_file(package).write_bytes(damaged)
        try:
            load_program(package)
        except PackageError:
            pass
