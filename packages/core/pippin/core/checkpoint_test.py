import dataclasses
import hashlib
import logging
import os
import random
from pathlib import Path

import pytest

# Read when JAX first looks for devices, which no module does while it is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pippin.core.checkpoint import Checkpointer, Restored
from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.manifest import read_manifest
from pippin.v1 import model_pb2 as pb

COMPONENT = CheckpointerConfig()  # any config will do


def open_checkpointer(directory: Path, **fields) -> Checkpointer:
    return CheckpointerConfig(**fields).build(directory=directory, component=COMPONENT)


def mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def make_state(seed: int = 0, shape: tuple[int, int] = (4, 2)) -> dict:
    """A state with leaves that are split in both dims, in one, in none, and of every kind of tree node."""
    on = mesh(*shape)
    rng = np.random.default_rng(seed)

    def put(values, *spec):
        return jax.device_put(values, NamedSharding(on, P(*spec)))

    return {
        "params": {
            "embedding": put(rng.normal(size=(16, 8)).astype(np.float32), "a", "b"),
            "norm": {"weight": put(jnp.asarray(rng.normal(size=8), jnp.bfloat16))},
        },
        "learner": (put(jnp.int32(seed)), {"mu": put(rng.normal(size=(8, 3)).astype(np.float32), "b")}),
        "key": put(jax.random.key_data(jax.random.key(seed))),
    }


def template(state: dict) -> dict:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def load(checkpointer: Checkpointer, like: dict, step: int | None = None) -> Restored:
    restored = checkpointer.load(like, step)
    assert restored is not None
    return restored


def assert_equal(a: dict, b: dict) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("to", [(4, 2), (2, 4), (1, 1)])
def test_a_step_is_loaded_onto_any_sharding(tmp_path, to):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state, {"input": b"\x00\xff", "rng": b""})
        restored = load(checkpointer, template(make_state(seed=1, shape=to)))
    assert (restored.step, restored.extra, restored.skipped) == (7, {"input": b"\x00\xff", "rng": b""}, ())
    assert_equal(restored.state, state)
    assert restored.state["params"]["embedding"].sharding.mesh.devices.shape == to
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)


def test_what_was_saved_is_what_was_there_when_save_returned_though_it_is_donated(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 2 + 1, s), donate_argnums=0)
    on = NamedSharding(mesh(4, 2), P("a", "b"))
    state = step({"w": jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), on)})
    expected = jax.tree.map(lambda a: np.array(a, copy=True), state)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(20):
            state = step(state)
        assert_equal(load(checkpointer, template(state)).state, expected)


def test_loaded_state_can_be_donated(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        first = load(checkpointer, template(state)).state
        second = load(checkpointer, template(state)).state
    jax.jit(lambda s: jax.tree.map(lambda a: a + a, s), donate_argnums=0)(first)
    assert_equal(second, state)


def test_each_chunk_has_the_sha256_of_its_values(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    message = read_manifest(tmp_path / "1", pb.CheckpointManifest)
    arrays = {a.name: a for a in message.arrays}
    assert list(arrays) == ["key", "learner.0", "learner.1.mu", "params.embedding", "params.norm.weight"]
    values = np.asarray(state["params"]["embedding"])
    chunks = arrays["params.embedding"].chunks
    assert len(chunks) == 8
    for chunk in chunks:
        (i, j), (h, w) = chunk.start, chunk.shape
        part = values[i : i + h, j : j + w]
        assert chunk.sha256 == hashlib.sha256(part.tobytes()).hexdigest()


def damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "truncate":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def step_files(state: dict, tmp_path: Path) -> list[str]:
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"input": b"state"})
    folder = tmp_path / "1"
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("how", ["flip", "flip again", "truncate", "delete"])
def test_damage_to_any_file_is_named_and_the_newest_whole_step_is_used(tmp_path, caplog, how):
    caplog.set_level(logging.CRITICAL)
    rng = random.Random(how)
    old, new = make_state(seed=1), make_state(seed=2)
    files = step_files(new, tmp_path / "probe")
    assert {"manifest.textproto", "component.textproto", "extra/input", "arrays/learner.0/c"} < set(files)
    run = tmp_path / "run"
    with open_checkpointer(run) as checkpointer:
        checkpointer.save(1, old, {"input": b"old"})
    for name in files:
        with open_checkpointer(run) as checkpointer:
            checkpointer.save(2, new, {"input": b"new"})
            checkpointer.wait()
            damage(run / "2" / name, how, rng)
            restored = load(checkpointer, template(new))
        assert (restored.step, restored.extra) == (1, {"input": b"old"}), name
        assert_equal(restored.state, old)
        (skipped,) = restored.skipped
        assert [p.partition(":")[0] for p in skipped.problems] == [name]
        assert skipped.step == 2
        assert skipped.moved_to.is_dir()
        assert skipped.moved_to.name.startswith("2.damaged")
        assert not (run / "2").exists()


def test_a_step_that_was_set_aside_is_saved_again(tmp_path):
    state = {"w": jnp.ones(2)}
    with open_checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state)
        checkpointer.wait()
        (tmp_path / "2/manifest.textproto").unlink()
        assert load(checkpointer, state).step == 1
        checkpointer.save(2, state)
        assert load(checkpointer, state).step == 2


def test_orbax_itself_reads_the_arrays(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    names = ["key", "learner.0", "learner.1.mu", "params.embedding", "params.norm.weight"]
    arrays = ocp.PyTreeCheckpointer().restore(
        tmp_path / "1/arrays", restore_args=dict.fromkeys(names, as_numpy)
    )
    np.testing.assert_array_equal(arrays["params.embedding"], state["params"]["embedding"])


def test_a_chunk_of_zeros_that_was_deleted_is_damage_too(tmp_path):
    # TensorStore reads it as zeros, so the values would be right by luck.
    state = {"w": jnp.zeros((4, 4))}
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        (tmp_path / "1/arrays/w/c/0/0").unlink()
        with pytest.raises(CheckpointError, match="arrays/w/c/0/0: is absent"):
            load(checkpointer, template(state))


def test_no_whole_step_is_an_error_and_stays_one(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, {"input": b"state"})
            checkpointer.wait()
            (tmp_path / str(step) / "extra/input").write_bytes(b"stat3")
        with pytest.raises(
            CheckpointError, match=r"no checkpoint .* is whole: step 2 .*extra/input: .*step 1 "
        ):
            load(checkpointer, template(state))
    alone = pytest.raises(CheckpointError, match=r"damaged checkpoints alone: 1\.damaged, 2\.damaged")
    with open_checkpointer(tmp_path) as checkpointer, alone:
        load(checkpointer, template(state))


def test_an_empty_directory_has_nothing_to_load(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.load({"w": jnp.ones(2)}) is None
        with pytest.raises(CheckpointError, match="has no step 3. It has none"):
            load(checkpointer, {"w": jnp.ones(2)}, step=3)


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda s: {**s, "ema": s["key"]}, "it has no ema"),
        (lambda s: {k: v for k, v in s.items() if k != "key"}, "its key is not in the state"),
        (
            lambda s: {**s, "key": jnp.zeros(3, jnp.uint32)},
            r"its key is uint32\[2\], the state's uint32\[3\]",
        ),
        (lambda s: {**s, "key": jnp.zeros(2, jnp.int32)}, r"its key is uint32\[2\], the state's int32\[2\]"),
    ],
)
def test_a_step_of_another_model_is_refused_and_left_in_place(tmp_path, change, problem):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        with pytest.raises(CheckpointError, match=f"1 is of another model or learner: {problem}"):
            load(checkpointer, change(make_state()))
        assert load(checkpointer, template(make_state())).step == 1


@pytest.mark.parametrize("leaf", [3, np.ones(2), jnp.zeros((0, 3)), jax.ShapeDtypeStruct((2,), jnp.float32)])
def test_a_leaf_that_cannot_be_stored_is_named(tmp_path, leaf):
    named = pytest.raises(CheckpointError, match="the state's params.w is ")
    with open_checkpointer(tmp_path) as checkpointer, named:
        checkpointer.save(1, {"params": {"w": leaf}})


def test_the_last_and_every_so_many_steps_are_kept(tmp_path):
    state = {"w": jnp.ones(2)}
    with open_checkpointer(tmp_path, keep_last=2, keep_every_steps=4) as checkpointer:
        for step in range(1, 10):
            checkpointer.save(step, state)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir()) == [4, 8, 9]


def test_one_job_at_a_time_has_a_directory(tmp_path):
    in_use = pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()} on ")
    with open_checkpointer(tmp_path), in_use:
        open_checkpointer(tmp_path)
    open_checkpointer(tmp_path).close()


def test_a_step_is_saved_once_and_never_overwritten(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)})
        checkpointer.save(1, {"w": jnp.zeros(2)})
        np.testing.assert_array_equal(load(checkpointer, {"w": jnp.zeros(2)}).state["w"], np.ones(2))
    there = pytest.raises(CheckpointError, match="1 is there already, from an earlier run")
    with open_checkpointer(tmp_path) as checkpointer, there:
        checkpointer.save(1, {"w": jnp.ones(2)})


def test_what_a_killed_job_left_is_cleared(tmp_path):
    for name in ("3.tmp", "2.removing"):
        (tmp_path / name / "arrays").mkdir(parents=True)
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.load({"w": jnp.ones(2)}) is None
    assert [p.name for p in tmp_path.iterdir()] == [".lease"]


def test_an_asked_for_step_is_loaded_or_refused(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": jnp.full(2, step)})
        assert load(checkpointer, {"w": jnp.full(2, 0)}, step=1).state["w"][0] == 1
        (tmp_path / "2/component.textproto").unlink()
        with pytest.raises(CheckpointError, match="step 2 .*component.textproto: is absent"):
            load(checkpointer, {"w": jnp.full(2, 0)}, step=2)


def test_fields_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"keep_last got 0; it must be above 0"):
        CheckpointerConfig(keep_last=0)
    assert dataclasses.is_dataclass(CheckpointerConfig)
