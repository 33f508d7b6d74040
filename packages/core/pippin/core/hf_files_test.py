import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pippin.core.errors import CheckpointError
from pippin.core.hf_files import open_weights, read_json_object, save_folder
from pippin.core.manifest import DamageError
from pippin.core.stored_tensor import StoredTensor

_VALUES = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.ones((3, 1), np.float16),
}


def _stored(values):
    return {name: StoredTensor(v.shape, v.dtype, lambda v=v: v) for name, v in values.items()}


def _save(directory, **kwargs):
    options = {"tokenizer": None, "max_file_bytes": 1 << 20} | kwargs
    save_folder(directory, {"model_type": "llama"}, _stored(_VALUES), **options)
    return directory


@pytest.mark.parametrize(("max_file_bytes", "files"), [(1 << 20, 1), (30, 2), (1, 3)])
def test_weights_come_back_bit_for_bit_from_any_number_of_files(tmp_path, max_file_bytes, files):
    folder = _save(tmp_path / "model", max_file_bytes=max_file_bytes)
    assert len(list(folder.glob("*.safetensors"))) == files
    assert (folder / "model.safetensors.index.json").exists() == (files > 1)
    found = open_weights(folder)
    assert found.keys() == _VALUES.keys()
    for name, value in _VALUES.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert found[name].read().tobytes() == value.tobytes()


def test_the_index_counts_bytes_and_names_files(tmp_path):
    index = read_json_object(_save(tmp_path / "model", max_file_bytes=30) / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 24 + 8 + 6
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


def test_tokenizer_files_are_copied_and_the_config_is_not(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "optimizer.pt"):
        (source / name).write_text("{}")
    folder = _save(tmp_path / "model", tokenizer=source)
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert read_json_object(folder / "config.json") == {"model_type": "llama"}


def test_a_folder_without_a_tokenizer_is_refused_as_one(tmp_path):
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor tokenizer.model"):
        _save(tmp_path / "model", tokenizer=tmp_path)
    assert not (tmp_path / "model").exists()


def test_an_existing_directory_is_left_alone(tmp_path):
    with pytest.raises(CheckpointError, match="is there already"):
        _save(tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path):
    def fail():
        raise OSError("No space left on device")

    broken = _stored(_VALUES) | {"d": StoredTensor((1,), np.dtype(np.float32), fail)}
    with pytest.raises(CheckpointError, match="was not saved: No space left"):
        save_folder(tmp_path / "model", {}, broken, tokenizer=None, max_file_bytes=30)
    assert not list(tmp_path.iterdir())


def test_pickles_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin, a pickle.*never read.*save_pretrained"):
        open_weights(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(CheckpointError, match="it holds readme.txt. Give the folder"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="it holds nothing"):
        open_weights(tmp_path / "absent")


@pytest.mark.parametrize("cut", [0, 7, 8, 20, -1])
def test_a_truncated_file_is_damaged(tmp_path, cut):
    folder = _save(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(DamageError, match=r"model.safetensors: "):
        open_weights(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "object", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_lies_is_damaged(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(DamageError, match=r"model.safetensors: "):
        open_weights(tmp_path)


def test_quantised_tensors_are_refused_by_name(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros(2, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="w is I8; only F32, F16, BF16"):
        open_weights(tmp_path)


def _with_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    safetensors.numpy.save_file(_VALUES, folder / "model-1.safetensors")
    return folder


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "../model-1.safetensors"}, "a is in '../model-1.safetensors', which is no"),
        ({"a": "/etc/passwd"}, "which is no .safetensors file beside it"),
        ({"a": 3}, "a is in 3"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": "model-2.safetensors"}, "model-2.safetensors: "),
        (dict.fromkeys("abcd", "model-1.safetensors"), "d is not in it"),
        (dict.fromkeys("ab", "model-1.safetensors"), "c is not in the index"),
    ],
)
def test_an_index_that_lies_is_damaged(tmp_path, weight_map, problem):
    with pytest.raises(DamageError, match=problem):
        open_weights(_with_index(tmp_path, weight_map))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "is no JSON"),
        (b"[1]", "holds a JSON list"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
    ],
    ids=["unfinished", "list", "not utf-8", "deep"],
)
def test_json_that_is_no_object_is_refused(tmp_path, data, problem):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=problem):
        read_json_object(tmp_path / "config.json")


def test_an_absent_or_huge_json_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json. Give the folder"):
        read_json_object(tmp_path / "config.json")
    with (tmp_path / "config.json").open("wb") as f:
        f.truncate(65 << 20)
    with pytest.raises(CheckpointError, match="at most 67108864 are read"):
        read_json_object(tmp_path / "config.json")
