"""Run with 8 devices (see BUILD): every axis of the mesh, and every pair of axes, trains what one device trains."""

import functools
import itertools
import re
from typing import Any

import jax
import numpy as np
import pytest

from pippin.core.config_tree import override, replace
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.kernel_select import record_choices
from pippin.layers.moe_config import MoEConfig
from pippin.train.step import TrainState, make_step
from pippin.train.toy import CountingInput, toy_config
from pippin.train.trainer import Trainer
from pippin.train.trainer_config import TrainerConfig

_STEPS = 3
_MICROBATCHES = 4  # of a pipeline; each is a slice of an accumulated batch, for one device

# Each with all 8 devices; a mesh with experts trains a mixture, and one with a pipeline by the schedule named.
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "sequence": {"sequence": 8},
    "expert": {"expert": 8},
    "data tensor": {"data": 4, "tensor": 2},
    "data fsdp": {"data": 4, "fsdp": 2},
    "data sequence": {"data": 2, "sequence": 4},
    "data expert": {"data": 2, "expert": 4},
    "data pipeline": {"data": 2, "pipeline": 4},
    "fsdp tensor": {"fsdp": 4, "tensor": 2},
    "fsdp sequence": {"fsdp": 2, "sequence": 4},
    "fsdp expert": {"fsdp": 2, "expert": 4},
    "fsdp pipeline": {"fsdp": 4, "pipeline": 2},
    "tensor sequence": {"tensor": 2, "sequence": 4},
    "tensor expert": {"tensor": 2, "expert": 4},
    "tensor pipeline": {"tensor": 2, "pipeline": 4},
    "sequence expert": {"sequence": 2, "expert": 4},
    "sequence pipeline": {"sequence": 2, "pipeline": 4},
    "expert pipeline": {"expert": 4, "pipeline": 2},
    "data fsdp tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp tensor pipeline": {"fsdp": 2, "tensor": 2, "pipeline": 2},
}
CASES = [
    *((name, None) for name, sizes in MESHES.items() if "pipeline" not in sizes),
    *((name, schedule) for name in MESHES if "pipeline" in name for schedule in ("gpipe", "1f1b")),
]


def _config(*, experts: bool, changes: dict[str, str]) -> TrainerConfig:
    cfg = toy_config(batch_size=16)
    sizes = {
        "model.decoder.num_layers": "4",
        "model.decoder.layer.attention.num_kv_heads": "2",  # for a tensor axis of 2
        "mesh.data": "1",
    }
    cfg = override(cfg, sizes)
    if experts:
        # Enough experts for all devices; a balance loss that is felt.
        cfg = replace(cfg, FeedForwardConfig, MoEConfig(num_experts=8, hidden_dim=16))
    return override(cfg, changes)


def _train(trainer: Trainer, state: TrainState, step: Any, place: Any) -> tuple[TrainState, list[float]]:
    source = CountingInput(trainer.cfg.input)
    losses = []
    for _ in range(_STEPS):
        state, metrics = step(state, place(next(source)))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def _one_device(experts: bool, accumulated: bool) -> tuple[TrainState, list[float]]:
    """The same steps by a plain jit, without a mesh."""
    cfg = _config(experts=experts, changes={"mesh.data": "8"})
    trainer = cfg.build(held_out=lambda most, task: ())
    step = make_step(trainer.definition, trainer.learner, _MICROBATCHES if accumulated else 1)
    return _train(trainer, jax.jit(trainer._init)(), jax.jit(step), lambda batch: batch)


@pytest.mark.parametrize(("mesh", "schedule"), CASES)
def test_a_mesh_trains_what_one_device_trains(mesh: str, schedule: str | None) -> None:
    assert jax.device_count() == 8
    sizes = MESHES[mesh]
    changes = {f"mesh.{axis}": str(size) for axis, size in sizes.items()}
    if schedule is not None:
        changes["model.decoder.pipeline"] = "Pipeline"
        changes["model.decoder.pipeline.schedule"] = schedule
        changes["model.decoder.pipeline.microbatches"] = str(_MICROBATCHES)
    trainer = _config(experts="expert" in sizes, changes=changes).build(held_out=lambda most, task: ())
    state = trainer.init(CountingInput(trainer.cfg.input).tokenizer_dir)
    with record_choices() as choices:
        step = trainer.compile()
    _require_its_own_way(sizes, {choice.kernel for choice in choices}, step.as_text())
    state, losses = _train(trainer, state, step, trainer.place)
    expected, expected_losses = _one_device("expert" in sizes, schedule is not None)
    # Sums over 8 devices are added in another order: a few float32 roundings in each of three steps.
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    # Adam's mean of gradients, and not the parameters: Adam divides by the gradients' size, so that the noise of one that
    # is almost zero moves a parameter as far as any other. Noise is of the size of what was added up.
    for ours, theirs in zip(_gradients(state), _gradients(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(np.max(np.abs(theirs))))


def _require_its_own_way(sizes: dict[str, int], kernels: set[str], program: str) -> None:
    """Raises unless sequences, pipelines and experts are what runs, and not what the compiler makes of the plain model."""
    assert ("RingKernel" in kernels) == ("sequence" in sizes)
    if "sequence" in sizes or "pipeline" in sizes:
        assert "collective-permute" in program
    if "expert" in sizes:
        assert re.search(r"op_name=\"[^\"]*shard_map/(psum_scatter|reduce_scatter)", program)


def _gradients(state: TrainState) -> list[np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(state.learner.optimizer)
    found = [np.asarray(leaf) for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    assert len(found) == len(jax.tree.leaves(state.params))
    return found


def test_every_pair_of_axes_is_tried() -> None:
    axes = ("data", "fsdp", "sequence", "expert", "tensor", "pipeline")
    pairs = {frozenset(sizes) for sizes in MESHES.values()}
    assert all(frozenset(pair) in pairs for pair in itertools.combinations(axes, 2))
