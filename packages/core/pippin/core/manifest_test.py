import pytest

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.v1 import model_pb2 as pb


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    message = pb.ModelManifest(
        weights=[pb.Weight(name='ä\n"', shape=[2, 3])], provenance=manifest.provenance()
    )
    manifest.write_manifest(tmp_path, message)
    assert manifest.read_manifest(tmp_path, pb.ModelManifest) == message


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    manifest.write_manifest(tmp_path, pb.ModelManifest(weights=[pb.Weight(name="w", shape=[2])]))
    path = tmp_path / manifest.FILE_NAME
    data = path.read_bytes()
    for i in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        with pytest.raises(DamageError, match="manifest.textproto: does not match the checksum"):
            manifest.read_manifest(tmp_path, pb.ModelManifest)


def test_an_absent_manifest_is_damage(tmp_path):
    with pytest.raises(DamageError, match="manifest.textproto: is absent"):
        manifest.read_manifest(tmp_path, pb.ModelManifest)


def test_another_kind_of_manifest_is_refused(tmp_path):
    manifest.write_manifest(tmp_path, pb.CheckpointManifest(step=1))
    with pytest.raises(CheckpointError, match="it is of another kind") as error:
        manifest.read_manifest(tmp_path, pb.ModelManifest)
    assert not isinstance(error.value, DamageError)
