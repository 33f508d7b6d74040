"""An adapter comes to a package that is there: whole or not at all, and the package stays as it is."""

import concurrent.futures
import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from pippin.core import manifest
from pippin.core.adapter import LowRank, save_adapter
from pippin.core.bundle import save_bundle
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.export import lower_testing as t
from pippin.export import verify
from pippin.export.adapter import add_adapters, main
from pippin.export.adapter_layout import adapter_layout
from pippin.export.compress.recipes import NO_RECIPE
from pippin.export.export_coreml import Options, export_coreml
from pippin.export.golden import golden_path
from pippin.export.output import MANIFEST, Places, exclusive, read_manifest, rewriting, write_manifest
from pippin.export.verification import read_adapter
from pippin.layers import configs as c
from pippin.layers.adapter import model_signature
from pippin.v1 import export_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, and an export of it that nobody ran, whose program is of one byte."""

    model: Path
    signature: str
    package: Path

    @property
    def places(self) -> Places:
        return Places.of(self.package)


@pytest.fixture(scope="module")
def model() -> t.Model:
    return t.model(t.TINY)


def make_base(folder: Path, package: str, model: t.Model) -> Base:
    bundle = save_bundle(folder / "base", model.cfg, model.params)
    signature = model_signature(model.params)
    places = Places.of(folder / package)
    places.package.mkdir()
    places.folder.mkdir()
    (places.package / "program").write_bytes(b"1")
    layout = adapter_layout({name: values.shape for name, values in model.flat.items()}, 4, signature)
    write_manifest(places, pb.ExportManifest(target="some", adapter=layout))
    return Base(bundle, signature, places.package)


@pytest.fixture(params=["x.mlpackage", "x.aimodel"])
def base(request, model, tmp_path) -> Base:
    return make_base(tmp_path, request.param, model)


def make_adapter(folder: Path, base: str, rank: int = 2, scale: float = 1.0, path: str = "q_proj") -> Path:
    """An adapter of one linear map of each layer, in their stack."""
    rng = np.random.default_rng(0)
    pair = LowRank(scale * rng.normal(size=(2, 64, rank)), rng.normal(size=(2, rank, 64)))
    maps = {f"decoder.layer.attention.{path}": LowRank(*(part.astype(np.float32) for part in pair))}
    return save_adapter(folder, maps, base)


def everything(folder: Path) -> dict[str, str]:
    """The files of a folder, hidden ones too, with their digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_it_is_what_an_export_with_the_adapter_writes(model, tmp_path, capsys):
    bundle = save_bundle(tmp_path / "base", model.cfg, model.params)
    adapter = make_adapter(tmp_path / "polite", model_signature(model.params), scale=0.1)
    options = Options(t.SIZES.context_length, t.SIZES.prefill_length, adapter_rank=4, recipe=NO_RECIPE)
    with_it, later = tmp_path / "with.mlpackage", tmp_path / "later.mlpackage"
    export_coreml(bundle, with_it, dataclasses.replace(options, adapters=(adapter,)))
    export_coreml(bundle, later, options)
    package = everything(later)
    assert main([str(later), "--adapter", str(adapter)]) == 0
    written = Places.of(later).folder / "adapters" / "polite.bin"
    assert f"{written}: 0.0 MB" in capsys.readouterr().out
    assert written.read_bytes() == (Places.of(with_it).folder / "adapters" / "polite.bin").read_bytes()
    assert everything(later) == package
    given = [str(later), "--model", str(bundle), "--steps", "4"]
    assert verify.main([*given, "--adapter", str(written)]) == verify.main([*given, "--record"]) == 0
    assert verify.main([*given, "--adapter", str(written), "--record"]) == 0, capsys.readouterr()
    assert {path.name for path in Places.of(later).folder.glob("golden*")} == {
        "golden.npz",
        "golden_polite.npz",
    }
    elsewhere = shutil.copy(written, tmp_path / "polite.bin")
    assert verify.main([*given, "--adapter", str(elsewhere), "--record"]) == 2
    assert "--record is for adapters beside the package" in capsys.readouterr().err


def test_one_that_is_there_stays_and_another_of_its_name_needs_a_word(base, tmp_path):
    adapter = make_adapter(tmp_path / "polite", base.signature)
    add_adapters(base.package, [adapter])
    exported = read_manifest(base.places)
    assert "x/adapters/polite.bin" in {file.path for file in exported.files}
    before = everything(tmp_path)
    assert add_adapters(base.package, [adapter]).endswith("polite.bin is there already")
    assert everything(tmp_path) == before

    golden_path(base.places, "polite").write_bytes(b"of the first")
    other = make_adapter(tmp_path / "others" / "polite", base.signature, scale=2.0)
    with pytest.raises(CheckpointError, match="is another adapter. Give --replace"):
        add_adapters(base.package, [other])
    assert "polite.bin: " in add_adapters(base.package, [other], replace=True)
    exported = read_manifest(base.places)
    assert exported.adapter.rank == 4 and not golden_path(base.places, "polite").exists()


def test_a_file_that_is_damaged_is_written_again(base, tmp_path):
    adapter = make_adapter(tmp_path / "polite", base.signature)
    add_adapters(base.package, [adapter])
    before = everything(tmp_path)
    (base.places.folder / "adapters" / "polite.bin").write_bytes(b"?")
    with pytest.raises(DamageError, match="polite.bin: has 1 bytes"):
        read_manifest(base.places)
    add_adapters(base.package, [adapter])
    assert everything(tmp_path) == before


def add_old(base: Base, directory: Path) -> None:
    """Adds an adapter that is to be replaced, with golden vectors."""
    add_adapters(base.package, [make_adapter(directory, base.signature, scale=3.0)])
    golden = golden_path(base.places, directory.name)
    with rewriting(base.places, [golden]):
        golden.write_bytes(b"of the old one")


class Killed(BaseException):
    """As if the process ended there."""


@pytest.mark.parametrize("replaced", [False, True])
def test_whenever_it_is_killed_the_export_is_whole_and_a_second_try_mends_it(
    base, tmp_path, monkeypatch, replaced
):
    if replaced:
        add_old(base, tmp_path / "old" / "polite")
    given = [make_adapter(tmp_path / name, base.signature) for name in ("polite", "terse")]
    places, steps = base.places, 3 + replaced
    shutil.copytree(places.folder, tmp_path / "before")
    done = []
    for step in range(2 * steps):  # before each file takes its name, and behind
        shutil.rmtree(places.folder)
        shutil.copytree(tmp_path / "before", places.folder)
        with monkeypatch.context() as patch:
            _kill_at(patch, step)
            with pytest.raises(Killed):
                add_adapters(base.package, given, replace=replaced)
        read_manifest(places)  # all that it lists is as it says
        add_adapters(base.package, given, replace=replaced)
        read_manifest(places)
        done.append(everything(places.folder))
    assert all(found == done[0] for found in done)
    assert set(done[0]) == {MANIFEST, "adapters/polite.bin", "adapters/terse.bin"}


def _kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    real, count = Path.replace, iter(range(100))

    def replace(self, target):
        at = next(count)
        if at == step // 2 and step % 2 == 0:
            raise Killed
        real(self, target)
        if at == step // 2:
            raise Killed

    patch.setattr(Path, "replace", replace)


@pytest.mark.parametrize(
    ("replaced", "write", "told"),
    [
        (False, 0, r"polite\.bin"),
        (False, 1, r"terse\.bin"),
        (True, 0, r"polite\.bin"),
        (True, 1, r"terse\.bin"),
        (True, 2, MANIFEST),
    ],
)
def test_a_full_disk_is_told_and_leaves_what_was(base, tmp_path, monkeypatch, replaced, write, told):
    if replaced:
        add_old(base, tmp_path / "old" / "polite")
    given = [make_adapter(tmp_path / name, base.signature) for name in ("polite", "terse")]
    before = everything(tmp_path)
    _fill_disk_at(monkeypatch, write)
    with pytest.raises(CheckpointError, match=f"{told} was not written: .*No space left.*Make room"):
        add_adapters(base.package, given, replace=True)
    assert everything(tmp_path) == before
    read_manifest(base.places)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_disk_that_is_full_for_the_last_manifest_leaves_a_true_one(base, tmp_path, monkeypatch, replaced):
    if replaced:
        add_old(base, tmp_path / "old" / "polite")
    adapter = make_adapter(tmp_path / "polite", base.signature)
    with monkeypatch.context() as patch:
        _fill_disk_at(patch, 1 + replaced)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} was not written"):
            add_adapters(base.package, [adapter], replace=True)
    assert {file.path for file in read_manifest(base.places).files} == {f"{base.package.name}/program"}
    add_adapters(base.package, [adapter])
    read_manifest(base.places)
    assert set(everything(base.places.folder)) == {MANIFEST, "adapters/polite.bin"}


def _fill_disk_at(patch: pytest.MonkeyPatch, write: int) -> None:
    """Lets the disk take so many files, and of the others half."""
    count, write_file = iter(range(100)), manifest.write_file

    def full(path, data):
        if next(count) < write:
            return write_file(path, data)
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    patch.setattr(manifest, "write_file", full)


def test_a_disk_that_does_not_give_a_file_is_told(base, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "polite", base.signature)
    add_adapters(base.package, [adapter])

    def broken(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "read_bytes", lambda p, real=Path.read_bytes: (broken if p.stem == "polite" else real)(p)
        )
        with pytest.raises(
            CheckpointError, match=r"polite\.bin was not read: .*Input/output.* remove the file"
        ):
            add_adapters(base.package, [adapter])
    (base.places.folder / "adapters" / "polite.bin").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "file_sha256", broken)
        with pytest.raises(CheckpointError, match=r"polite\.bin was not read again: .*mend the disk"):
            add_adapters(base.package, [adapter])
    shutil.rmtree(base.places.folder)
    with pytest.raises(CheckpointError, match=r"x was not opened: .*Put it beside x\."):
        add_adapters(base.package, [adapter])


def test_one_that_is_added_meanwhile_waits_and_both_are_listed(base, tmp_path):
    adapters = [make_adapter(tmp_path / name, base.signature) for name in ("polite", "terse", "formal")]
    add_adapters(base.package, adapters[:1])
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with exclusive(base.places):
            added = [threads.submit(add_adapters, base.package, [adapter]) for adapter in adapters[1:]]
            assert not concurrent.futures.wait(added, timeout=0.5).done
        assert all("bin: " in one.result() for one in added)
    assert {file.path for file in read_manifest(base.places).files} >= {
        f"x/adapters/{adapter.name}.bin" for adapter in adapters
    }


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ({"base": "f" * 64}, "was trained on the model with the signature ffffffffffff; this package holds"),
        ({"rank": 8}, "has rank 8; the package has room for 4. Export it with --adapter-rank 8"),
        (
            {"path": "x_proj"},
            "has maps for decoder.layers.0.attention.x_proj, for which the package has no room",
        ),
        ({"scale": 1e6}, "beyond 65504"),
    ],
)
def test_one_that_does_not_fit_is_refused(base, tmp_path, what, expected):
    adapter = make_adapter(tmp_path / "a", **({"base": base.signature} | what))
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        add_adapters(base.package, [adapter])
    assert everything(tmp_path) == before


def test_mistakes_are_told_without_a_stack_trace(base, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "polite", base.signature)
    again = make_adapter(tmp_path / "again" / "polite", base.signature)
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    (damaged / "adapter.safetensors").write_bytes(b"?")
    no_room = Places.of(tmp_path / f"y{base.package.suffix}")
    shutil.copytree(base.package, no_room.package)
    no_room.folder.mkdir()
    write_manifest(no_room, pb.ExportManifest(target="some"))
    for arguments, expected in (
        ([base.package, "--adapter", tmp_path / "none"], "no such directory. Give one that"),
        ([base.package, "--adapter", damaged], "is damaged: adapter.safetensors"),
        ([base.package, "--adapter", adapter, "--adapter", again], "two of the adapters are called polite"),
        ([tmp_path / "x", "--adapter", adapter], "does not end in .mlpackage or .aimodel"),
        ([tmp_path / "z.mlpackage", "--adapter", adapter], "there is no package"),
        (
            [no_room.package, "--adapter", adapter],
            "without room for adapters. Export it again with --adapter-rank",
        ),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        told = capsys.readouterr().err
        assert expected in told and "Traceback" not in told, told


def test_an_adapter_of_a_part_of_the_stacks_needs_the_model(tmp_path):
    layer = t.TINY.decoder.layer  # type: ignore[attr-defined]
    stack = c.RepeatConfig(layer=layer, num_layers=2)
    made = t.model(t.TINY.set(decoder=c.SequenceConfig(layers=(stack, layer))))
    base = make_base(tmp_path, "x.mlpackage", made)
    pair = LowRank(np.ones((2, 64, 4), np.float32), np.full((2, 4, 64), 2, np.float32))
    path = "decoder.layers.0.layer.attention.q_proj"
    adapter = save_adapter(tmp_path / "part", {path: pair}, base.signature)
    with pytest.raises(
        CheckpointError, match="has 3 layers, and does not say which are meant. Give what was"
    ):
        add_adapters(base.package, [adapter])
    other = t.model(t.TINY, seed=1)
    bundle = save_bundle(tmp_path / "other", other.cfg, other.params)
    with pytest.raises(
        CheckpointError, match="other has the signature .* was made of .* Give what was exported"
    ):
        add_adapters(base.package, [adapter], model=str(bundle))
    add_adapters(base.package, [adapter], model=str(base.model))
    layout = read_manifest(base.places).adapter
    flat = read_adapter(base.places.folder / "adapters" / "part.bin", layout)
    for slot in layout.slots:
        values = flat[slot.offset : slot.offset + int(np.prod(slot.shape))]
        at_layer = slot.name.startswith(("decoder.layers.0.attention.q", "decoder.layers.1.attention.q"))
        assert set(values.tolist()) == ({1.0 + slot.name.endswith("up")} if at_layer else {0.0}), slot.name
