"""Tests of adapters on disk: they come back as they were, and nothing else is taken for one."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pippin.core import manifest
from pippin.core.adapter import LowRank, load_adapter, save_adapter
from pippin.core.bundle import load_bundle
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.v1 import model_pb2 as pb

_Q = "decoder.layer.attention.q_proj"


def _maps(seed: int = 0) -> dict[str, LowRank]:
    rng = np.random.default_rng(seed)
    return {
        _Q: LowRank(rng.standard_normal((2, 6, 3), np.float32), rng.standard_normal((2, 3, 4), np.float32)),
        "head": LowRank(np.ones((6, 1), ml_dtypes.bfloat16), np.ones((1, 9), ml_dtypes.bfloat16)),
    }


def test_an_adapter_comes_back(tmp_path):
    adapter = load_adapter(save_adapter(tmp_path / "sums", _maps(), "ab12"))
    assert adapter.base_signature == "ab12"
    assert adapter.rank == 3
    read = adapter.maps()
    assert read.keys() == _maps().keys()
    for path, (down, up) in _maps().items():
        np.testing.assert_array_equal(read[path].down, down.astype(np.float32))
        np.testing.assert_array_equal(read[path].up, up.astype(np.float32))


def test_an_adapter_is_never_overwritten_and_nothing_is_left_of_one_that_failed(tmp_path):
    save_adapter(tmp_path / "a", _maps(), "ab")
    with pytest.raises(CheckpointError, match="is there already"):
        save_adapter(tmp_path / "a", _maps(1), "ab")
    with pytest.raises(CheckpointError, match="complex64"):
        save_adapter(tmp_path / "b", {"q": LowRank(np.ones((2, 1), np.complex64), np.ones((1, 2)))}, "ab")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["manifest.textproto", "adapter.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "cut", "flipped"])
def test_damage_is_told(tmp_path, name, damage):
    path = save_adapter(tmp_path / "a", _maps(), "ab") / name
    data = bytearray(path.read_bytes())
    if damage == "absent":
        path.unlink()
    else:
        data[-2] ^= 1
        path.write_bytes(data[:-1] if damage == "cut" else data)
    with pytest.raises(DamageError):
        load_adapter(tmp_path / "a").maps()


def test_a_bundle_and_an_adapter_are_not_each_other(tmp_path):
    save_adapter(tmp_path / "a", _maps(), "ab")
    with pytest.raises(CheckpointError, match="of another kind"):
        load_bundle(tmp_path / "a")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    maps = _maps()
    maps[_Q].up[0, 0, 0] = np.inf
    adapter = load_adapter(save_adapter(tmp_path / "a", maps, "ab"))
    with pytest.raises(CheckpointError, match=f"{_Q}.up holds NaN or infinity"):
        adapter.maps()


@pytest.mark.parametrize(
    ("maps", "match"),
    [
        ({"q": LowRank(np.ones((4, 2)), np.ones((2, 4)))}, "q.down is float64"),
        ({"q": LowRank(np.ones((4, 2), np.int8), np.ones((2, 4), np.int8))}, "q.down is int8"),
        ({"q": LowRank(np.ones((4, 2), np.float32), np.ones((3, 4), np.float32))}, "must be"),
        ({"q": LowRank(np.ones((3, 4, 2), np.float32), np.ones((2, 4), np.float32))}, "must be"),
        ({"q": LowRank(np.ones((4, 0), np.float32), np.ones((0, 4), np.float32))}, "must be"),
        ({}, "not pairs"),
    ],
)
def test_maps_that_make_no_sense_are_refused(tmp_path, maps, match):
    save_adapter(tmp_path / "a", maps, "ab")
    with pytest.raises(CheckpointError, match=match):
        load_adapter(tmp_path / "a")


def _rewritten(directory: Path, change) -> None:
    message = manifest.read_manifest(directory, pb.AdapterManifest)
    change(message)
    manifest.write_manifest(directory, message)


def test_half_a_pair_and_files_elsewhere_are_refused(tmp_path):
    save_adapter(tmp_path / "a", _maps(), "ab")
    _rewritten(tmp_path / "a", lambda m: m.adapter.weights.pop())
    with pytest.raises(CheckpointError, match="not pairs"):
        load_adapter(tmp_path / "a")
    save_adapter(tmp_path / "b", _maps(), "ab")
    outside = str(tmp_path / "a" / "adapter.safetensors")
    _rewritten(tmp_path / "b", lambda m: setattr(m.adapter.weights[0], "file", outside))
    with pytest.raises(DamageError, match="none of its files"):
        load_adapter(tmp_path / "b")
    _rewritten(tmp_path / "b", lambda m: setattr(m.files[0], "path", outside))
    with pytest.raises(DamageError, match="leaves the directory"):
        load_adapter(tmp_path / "b")
