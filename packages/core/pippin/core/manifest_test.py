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


def test_two_that_write_one_directory_do_not_mix(tmp_path):
    with manifest.new_directory(tmp_path / "d", "bundle") as first:
        (first / "a").write_text("of the first")
        with (
            pytest.raises(CheckpointError, match="another process writes the bundle .*/d at this moment"),
            manifest.new_directory(tmp_path / "d", "bundle"),
        ):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "a"]
    with (
        pytest.raises(CheckpointError, match="is there already"),
        manifest.new_directory(tmp_path / "d", "bundle"),
    ):
        pass


def test_what_a_process_left_that_was_killed_is_removed(tmp_path):
    (tmp_path / ".d.tmp" / "folder").mkdir(parents=True)
    (tmp_path / ".d.tmp" / "file").write_text("half")
    (tmp_path / ".d.tmp" / "link").symlink_to(tmp_path)
    with manifest.new_directory(tmp_path / "d", "bundle") as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_place_that_cannot_be_is_not_told_as_a_full_disk(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "d", tmp_path / ("d" * 300)):
        with (
            pytest.raises(CheckpointError, match="Choose a place that exists and that you may write to"),
            manifest.new_directory(place, "bundle"),
        ):
            pass
