import random
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pippin.core import manifest
from pippin.core.bundle import Bundle, load_bundle, open_model, save_bundle
from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.v1 import model_pb2 as pb

MODEL = "model.safetensors"
COMPONENT, OTHER = CheckpointerConfig(), CheckpointerConfig(keep_last=9)  # any configs will do


def make_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "decoder": {
            "norm": {"weight": jnp.asarray(rng.normal(size=(4,)), jnp.bfloat16)},
            "proj": {"weight": rng.normal(size=(3, 4)).astype(np.float32).T, "steps": np.array(7, np.int32)},
        },
        "head": {"weight": rng.normal(size=(5, 2)).astype(np.float16)},
    }


def make_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights of the model that the folder is of")
    return folder


def assert_params(bundle: Bundle, params: dict) -> None:
    read = bundle.params()

    def compare(a: dict, b: dict) -> None:
        assert a.keys() == b.keys()
        for name, x in a.items():
            if isinstance(x, dict):
                compare(x, b[name])
            else:
                assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape)
                assert x.tobytes() == np.asarray(b[name]).tobytes()

    compare(read, params)


@pytest.mark.parametrize("max_file_bytes, num_files", [(4 << 30, 1), (40, 3), (1, 4)])
def test_a_bundle_is_read_as_it_was_written(tmp_path, max_file_bytes, num_files):
    params = make_params()
    provenance = manifest.provenance(recipe="stdlib_tiny", step=9, source="a run")
    directory = save_bundle(
        tmp_path / "bundle",
        OTHER,
        params,
        tokenizer=make_tokenizer(tmp_path / "t"),
        provenance=provenance,
        max_file_bytes=max_file_bytes,
    )
    bundle = load_bundle(directory)
    assert bundle.component == OTHER
    assert bundle.provenance == provenance
    assert bundle.tokenizer is not None
    assert {p.name for p in bundle.tokenizer.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    assert (bundle.tokenizer / "tokenizer.model").read_bytes() == bytes(range(256))
    assert list(bundle.weights) == [
        "decoder.norm.weight",
        "decoder.proj.steps",
        "decoder.proj.weight",
        "head.weight",
    ]
    assert bundle.weights["decoder.norm.weight"].dtype == ml_dtypes.bfloat16
    assert_params(bundle, params)
    assert len(list(directory.glob("model*.safetensors"))) == num_files
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "t"}


def test_other_programs_read_the_weights(tmp_path):
    directory = save_bundle(tmp_path / "bundle", COMPONENT, {"head": {"weight": np.eye(3, dtype=np.float32)}})
    np.testing.assert_array_equal(load_file(directory / MODEL)["head.weight"], np.eye(3))


def test_damage_to_any_file_is_named(tmp_path):
    rng = random.Random(5)
    tokenizer = make_tokenizer(tmp_path / "t")
    params = make_params()
    whole = save_bundle(tmp_path / "bundle", COMPONENT, params, tokenizer=tokenizer)
    files = [p for p in sorted(whole.rglob("*")) if p.is_file()]
    assert len(files) == 4
    for path in files:
        name = path.relative_to(whole).as_posix()
        data = path.read_bytes()
        flips = [bytearray(data) for _ in range(60)]
        for flip in flips:
            flip[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for damaged in [None, b"", data[: rng.randrange(len(data))], data + b"\0", *flips]:
            path.unlink(missing_ok=True)
            if damaged is not None:
                path.write_bytes(damaged)
            try:
                bundle = load_bundle(whole)
                read = bundle.params()
            except DamageError as e:
                assert {p.partition(":")[0] for p in e.problems} == {name}
                continue
            # The header of safetensors has bits that mean nothing, such as the spaces that pad it.
            assert name == MODEL
            assert_params(bundle, params)
            assert read.keys() == params.keys()
        path.write_bytes(data)
    assert_params(load_bundle(whole), params)


def test_a_damaged_tensor_is_named_and_the_others_are_read(tmp_path):
    directory = save_bundle(tmp_path / "bundle", COMPONENT, make_params())
    data = bytearray((directory / MODEL).read_bytes())
    at = data.index(np.asarray(make_params()["head"]["weight"]).tobytes())
    data[at + 3] ^= 4
    (directory / MODEL).write_bytes(data)
    bundle = load_bundle(directory)
    with pytest.raises(DamageError, match=r"model\.safetensors: head\.weight: the values do not match"):
        bundle.weights["head.weight"].read()
    assert bundle.weights["decoder.proj.steps"].read() == 7


@settings(max_examples=200, deadline=None)
@given(
    header=st.one_of(st.binary(max_size=64), st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little")))
)
def test_a_hostile_header_is_refused_without_allocating(tmp_path_factory, header):
    directory = tmp_path_factory.mktemp("hostile") / "bundle"
    save_bundle(directory, COMPONENT, {"w": np.ones(64, np.float32)})
    size = (directory / MODEL).stat().st_size
    (directory / MODEL).write_bytes(
        header.ljust(size, b"\0")
    )  # the size is right: only the content is hostile
    with pytest.raises(DamageError, match=re.escape(f"{MODEL}: w: ")):
        load_bundle(directory).params()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_path_that_leaves_the_bundle_is_refused(tmp_path, name):
    directory = save_bundle(tmp_path / "bundle", COMPONENT, make_params())
    message = manifest.read_manifest(directory, pb.ModelManifest)
    message.tokenizer.files.add(path=name, bytes=3)
    manifest.write_manifest(directory, message)
    with pytest.raises(DamageError, match=f"{name}: leaves the directory"):
        load_bundle(directory)


def test_what_cannot_be_read_yet_is_refused(tmp_path):
    directory = save_bundle(tmp_path / "bundle", COMPONENT, make_params())
    message = manifest.read_manifest(directory, pb.ModelManifest)
    message.adapters.add(name="a")
    manifest.write_manifest(directory, message)
    with pytest.raises(CheckpointError, match="which this pippin cannot read"):
        load_bundle(directory)


def test_a_bundle_is_never_overwritten_and_nothing_is_left_of_one_that_failed(tmp_path):
    directory = save_bundle(tmp_path / "bundle", COMPONENT, make_params())
    with pytest.raises(CheckpointError, match="is there already"):
        save_bundle(directory, COMPONENT, make_params())
    with pytest.raises(CheckpointError, match="is no folder of a tokenizer's files"):
        save_bundle(tmp_path / "b", COMPONENT, make_params(), tokenizer=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty has no file of a tokenizer"):
        save_bundle(tmp_path / "b", COMPONENT, make_params(), tokenizer=tmp_path / "empty")
    (tmp_path / "empty").rmdir()
    with pytest.raises(CheckpointError, match="w is complex64; a bundle holds float64"):
        save_bundle(tmp_path / "b", COMPONENT, {"w": np.ones(2, np.complex64)})
    with pytest.raises(CheckpointError, match="'a.b' is no name of a parameter"):
        save_bundle(tmp_path / "b", COMPONENT, {"a.b": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_run_its_steps_and_a_bundle_are_opened_alike(tmp_path):
    run = tmp_path / "run"
    make_tokenizer(run / "tokenizer")
    with CheckpointerConfig().build(directory=run / "checkpoints", component=OTHER) as checkpointer:
        for step in (1, 2):
            params = {"w": {"weight": jnp.full((4, 2), step, jnp.bfloat16)}}
            checkpointer.save(step, {"params": params, "learner": (jnp.int32(step),)})
        for directory in (run, run / "checkpoints", run / "checkpoints/2"):  # while the job still runs
            checkpointer.wait()
            bundle = open_model(directory)
            assert bundle.component == OTHER
            assert bundle.provenance.step == 2
            assert bundle.tokenizer == run / "tokenizer"
            assert_params(bundle, {"w": {"weight": jnp.full((4, 2), 2, jnp.bfloat16)}})
    written = save_bundle(tmp_path / "bundle", bundle.component, bundle.params(), tokenizer=bundle.tokenizer)
    assert_params(open_model(written), bundle.params())

    (run / "checkpoints/2/manifest.textproto").unlink()
    assert open_model(run).provenance.step == 1
    (run / "checkpoints/1/arrays/params.w.weight/c/0/0").write_bytes(b"")
    with pytest.raises(
        DamageError, match=r"2/manifest\.textproto: is absent; 1/arrays/params\.w\.weight/c/0/0: has 0"
    ):
        open_model(run)
    with pytest.raises(CheckpointError, match="holds no model"):
        open_model(tmp_path)


def test_averaged_parameters_hide_those_that_they_average(tmp_path):
    state = {
        "params": {"w": jnp.full(3, 1.0, np.float32), "frozen": jnp.full(3, 2.0, np.float32)},
        "learner": {"ema": {"w": jnp.full(3, 3.0, np.float32)}},
    }
    for name, parameters, expected in (
        ("raw", ["params"], {"w": np.full(3, 1.0, np.float32), "frozen": np.full(3, 2.0, np.float32)}),
        (
            "averaged",
            ["params", "learner.ema"],
            {"w": np.full(3, 3.0, np.float32), "frozen": np.full(3, 2.0, np.float32)},
        ),
    ):
        with CheckpointerConfig().build(
            directory=tmp_path / name, component=COMPONENT, parameters=parameters
        ) as checkpointer:
            checkpointer.save(1, state)
        assert_params(open_model(tmp_path / name), expected)
    with CheckpointerConfig().build(
        directory=tmp_path / "elsewhere", component=COMPONENT, parameters=["weights"]
    ) as checkpointer:
        checkpointer.save(1, state)
    with pytest.raises(CheckpointError, match="no parameters under weights; it has learner, params"):
        open_model(tmp_path / "elsewhere")
