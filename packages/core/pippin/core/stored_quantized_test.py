"""Tests of compressed weights in bundles: read as they were written, or refused."""

import random
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pippin.core import manifest
from pippin.core.bundle import load_bundle, open_model, save_bundle
from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.quantized_array import PALETTE_BITS, Palettized, QuantizedArray, Scaled
from pippin.core.stored_array import array_sha256
from pippin.core.stored_tensor import signature
from pippin.v1 import model_pb2 as pb

MODEL = "model.safetensors"
COMPONENT = CheckpointerConfig()


def palettized(bits: int = 3, shape: tuple[int, int] = (5, 6)) -> Palettized:
    rng = np.random.default_rng(bits)
    luts = rng.normal(size=(1, 2, 2**bits)).astype(np.float16)
    return Palettized(rng.integers(0, 2**bits, shape).astype(np.uint8), luts, bits)


def scaled(bits: int = 8) -> Scaled:
    rng = np.random.default_rng(bits)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 5)).astype(np.int8)
    return Scaled(values, rng.random((3, 1)).astype(np.float16), bits)


def make_params() -> dict:
    return {
        "embedding": {"weight": scaled(8)},
        "head": {"weight": scaled(4)},
        "layers": {"0": {"proj": {"weight": palettized(), "bias": np.ones(6, np.float16)}}},
    }


@pytest.mark.parametrize("array", [*map(palettized, PALETTE_BITS), scaled(4), scaled(8)])
def test_a_compressed_weight_is_read_as_it_was_written(tmp_path, array: QuantizedArray):
    bundle = load_bundle(save_bundle(tmp_path / "b", COMPONENT, {"w": array}))
    read = bundle.quantized["w"]
    assert type(read) is type(array)
    assert read.bits == array.bits
    parts = ("indices", "luts") if isinstance(array, Palettized) else ("values", "scales")
    for part in parts:
        before, after = getattr(array, part), getattr(read, part)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(after, before)
    stored = load_file(tmp_path / "b" / MODEL)
    assert sum(part.nbytes for part in stored.values()) == array.nbytes


def test_readers_of_floats_see_floats(tmp_path):
    params = make_params()
    directory = save_bundle(
        tmp_path / "b", COMPONENT, params, quantization_recipe="palettize_3bit", max_file_bytes=1
    )
    bundle = open_model(directory)
    assert list(bundle.quantized) == ["embedding.weight", "head.weight", "layers.0.proj.weight"]
    assert len(bundle.quantized) == 3
    assert bundle.quantization_recipe == "palettize_3bit"
    assert list(bundle.weights) == [
        "embedding.weight",
        "head.weight",
        "layers.0.proj.bias",
        "layers.0.proj.weight",
    ]
    assert bundle.weights["head.weight"].shape == (3, 5)
    assert bundle.weights["head.weight"].dtype == np.float32
    read = bundle.params()
    proj = read["layers"]["0"]["proj"]
    np.testing.assert_array_equal(proj["weight"], palettized().dequantized())
    np.testing.assert_array_equal(read["head"]["weight"], scaled(4).dequantized())
    assert proj["bias"].dtype == np.float16
    # Written again, it is a bundle of floats of the same signature.
    again = load_bundle(save_bundle(tmp_path / "floats", COMPONENT, read))
    assert not again.quantized
    floats = [{name: tensor.read() for name, tensor in b.weights.items()} for b in (bundle, again)]
    assert signature(floats[0]) == signature(floats[1])


def test_a_bundle_of_floats_says_nothing_of_quantization(tmp_path):
    directory = save_bundle(
        tmp_path / "b", COMPONENT, {"w": np.ones(3, np.float32)}, quantization_recipe="none"
    )
    assert not manifest.read_manifest(directory, pb.ModelManifest).HasField("quantization")
    assert not load_bundle(directory).quantized


def test_damage_to_any_byte_is_told(tmp_path):
    directory = save_bundle(tmp_path / "b", COMPONENT, make_params())
    path, rng = directory / MODEL, random.Random(3)
    data = path.read_bytes()
    before = signature({name: tensor.read() for name, tensor in load_bundle(directory).weights.items()})
    found = 0
    for _ in range(300):
        flip = bytearray(data)
        flip[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flip)
        try:
            weights = load_bundle(directory).weights
            assert signature({name: tensor.read() for name, tensor in weights.items()}) == before
        except DamageError as e:
            assert e.problems[0].startswith(MODEL)
            found += 1
    path.write_bytes(bytes(len(data)))
    assert "head.weight" in load_bundle(directory).quantized  # asking reads nothing
    assert "other" not in load_bundle(directory).quantized
    assert found > 250  # the others hit a space that pads the header


def _tampered(directory, change) -> None:
    """Changes a bundle with the means of one who makes the checksums true again."""
    message = manifest.read_manifest(directory, pb.ModelManifest)
    tensors = load_file(directory / MODEL)
    change(message, tensors)
    save_file(tensors, directory / MODEL)
    for weight in message.weights:
        if weight.name in tensors:
            values = tensors[weight.name]
            weight.dtype, weight.shape[:], weight.sha256 = (
                str(values.dtype),
                values.shape,
                array_sha256(values),
            )
    for file in message.files:
        file.CopyFrom(manifest.describe_file(directory, directory / file.path))
    manifest.write_manifest(directory, message)


def _entry(message: pb.ModelManifest, name: str = "layers.0.proj.weight") -> pb.QuantizedWeight:
    return next(w for w in message.quantization.weights if w.name == name)


def _set(name: str, values: np.ndarray):
    return lambda message, tensors: tensors.update({name: values})


_PROJ = "layers.0.proj.weight"


@pytest.mark.parametrize("change, message", [
    (lambda m, t: _entry(m).ClearField("scheme"), f"{_PROJ} is quantised in a way that this pippin does not know"),
    (lambda m, t: setattr(_entry(m), "name", "other"), r"other\.indices is not in the weights index"),
    (lambda m, t: setattr(_entry(m), "name", "embedding.weight"), "embedding.weight is there twice"),
    (lambda m, t: setattr(_entry(m), "name", "layers.0.proj.bias"), "bias is there twice"),
    (lambda m, t: setattr(_entry(m).palette, "bits", 5), r"packed integers are uint8\[12\]; 30 of 5 bits are uint8\[19\]"),
    (lambda m, t: setattr(_entry(m).palette, "bits", 0), r"30 of 0 bits are uint8\[0\]"),
    (lambda m, t: _entry(m).shape.__setitem__(0, 2**50), r"6755399441055744 of 3 bits"),
    (lambda m, t: _entry(m).ClearField("shape"), r"1 of 3 bits are uint8\[1\]"),
    (lambda m, t: _entry(m).shape.__setitem__(slice(None), [3, 10]), None),  # the same packed bytes
    (lambda m, t: _entry(m).shape.__setitem__(slice(None), [2, 15]), r"must divide the dim"),
    (lambda m, t: t[_PROJ + ".luts"].__setitem__((0, 0, 0), np.nan), f"{_PROJ}: .*luts hold NaN"),
    (lambda m, t: t["embedding.weight.scales"].__setitem__((0, 0), np.inf), "scales hold NaN or infinity"),
    (lambda m, t: t[_PROJ + ".indices"].__setitem__(-1, 255), "of which 2 bits are used"),
    (_set(_PROJ + ".luts", np.zeros((1, 2, 8), np.float32)), "must be float16"),
    (_set(_PROJ + ".luts", np.zeros((1, 4, 8), np.float16)), "must divide the dim"),
    (_set(_PROJ + ".indices", np.zeros(13, np.uint8)), r"uint8\[13\]; 30 of 3 bits are uint8\[12\]"),
    (_set(_PROJ + ".indices", np.zeros(12, np.int8)), r"packed integers are int8\[12\]"),
])  # fmt: skip
def test_a_bundle_that_makes_no_sense_is_refused(tmp_path, change, message):
    directory = save_bundle(tmp_path / "b", COMPONENT, make_params())
    _tampered(directory, change)
    if message is None:
        assert load_bundle(directory).params()["layers"]["0"]["proj"]["weight"].shape == (3, 10)
        return
    with pytest.raises(CheckpointError, match=message):
        load_bundle(directory).params()


def test_a_scheme_of_a_later_version_is_refused(tmp_path):
    directory = save_bundle(tmp_path / "b", COMPONENT, {"w": palettized()})
    path = directory / manifest.FILE_NAME
    body = re.sub(r"palette \{\s*bits: 3\s*\}", "vector_palette { bits: 3 }", path.read_text())
    body = body[: body.index(manifest._CHECKSUM)]
    path.write_text(f"{body}{manifest._CHECKSUM}{manifest._sha256(body.encode())}\n")
    with pytest.raises(
        CheckpointError, match="vector_palette.*Read it with the version of pippin that wrote it"
    ):
        load_bundle(directory)
