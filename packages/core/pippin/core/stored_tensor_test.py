"""Tests of tensors in files: which file each lies in, and what a signature depends on."""

import ml_dtypes
import numpy as np
import pytest

from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.stored_tensor import signature, stored_tensor, write_tensors

_ARRAYS = {"a.w": np.arange(6, dtype=np.float32).reshape(2, 3), "b.w": np.ones(4, ml_dtypes.bfloat16)}


def test_arrays_come_back_from_one_file_or_several(tmp_path):
    for name, most, files in (("one", 1 << 20, {"m.safetensors"}), ("many", 1, 2)):
        folder = tmp_path / name
        folder.mkdir()
        weights = write_tensors(folder, "m", _ARRAYS, most)
        assert {w.file for w in weights} == files or len({w.file for w in weights}) == files
        for weight in weights:
            tensor = stored_tensor(folder, weight)
            assert tensor.shape == _ARRAYS[weight.name].shape
            assert tensor.dtype == _ARRAYS[weight.name].dtype
            np.testing.assert_array_equal(tensor.read(), _ARRAYS[weight.name])


def test_a_file_that_was_changed_is_told(tmp_path):
    (weight, _) = write_tensors(tmp_path, "m", _ARRAYS)
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m.safetensors").write_bytes(data)
    tensors = [stored_tensor(tmp_path, w) for w in (weight, _)]
    with pytest.raises(DamageError, match="do not match their SHA-256"):
        [tensor.read() for tensor in tensors]


def test_what_safetensors_cannot_store_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x is complex64"):
        write_tensors(tmp_path, "m", {"x": np.ones(2, np.complex64)})


def test_a_signature_is_of_names_shapes_and_values():
    first = signature(_ARRAYS)
    assert first == signature(dict(reversed(_ARRAYS.items())))
    assert first == signature({**_ARRAYS, "b.w": np.ones(4, np.float32)}), "the same numbers in another type"
    assert first != signature({**_ARRAYS, "b.w": np.ones(4, np.int32)})
    assert first != signature({**_ARRAYS, "a.w": _ARRAYS["a.w"].reshape(3, 2)})
    assert first != signature({"a.v": _ARRAYS["a.w"], "b.w": _ARRAYS["b.w"]})
    assert first != signature({**_ARRAYS, "a.w": np.nextafter(_ARRAYS["a.w"], 9, dtype=np.float32)})
