"""Run with 8 devices (see BUILD): what a trainer puts where, and what it refuses."""

import jax
import pytest

from pippin.core.config_tree import override
from pippin.core.errors import ConfigError, ShardingError
from pippin.train.toy import CountingInput, toy_config
from pippin.train.trainer import Trainer


def toy_trainer(**mesh: int) -> Trainer:
    changes = {f"mesh.{axis}": n for axis, n in mesh.items()}
    # Two key heads, so that a tensor axis of 2 can split them.
    heads = {"model.decoder.layer.attention.num_kv_heads": 2}
    return override(toy_config(), changes | heads).build(held_out=lambda most, task: ())


def test_fsdp_splits_parameters_and_optimizer_state() -> None:
    trainer = toy_trainer(data=1, fsdp=8)
    state = trainer.init(CountingInput(trainer.cfg.input).tokenizer_dir)
    for tree in (state.params, state.learner.optimizer, state.learner.ema):
        matrices = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 3]  # stacked by layer
        assert matrices
        for leaf in matrices:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size


def test_a_mesh_that_does_not_divide_a_parameter_is_refused() -> None:
    with pytest.raises(ShardingError, match="a dim of 20 on the logical axis 'vocab' cannot be split 8 ways"):
        cfg = override(toy_config(), {"mesh.tensor": 8, "mesh.data": 1, "model.vocab_size": 20})
        cfg.build(held_out=lambda most, task: ())


def test_a_mesh_that_does_not_fit_the_devices_is_refused() -> None:
    with pytest.raises(ShardingError, match="8 devices"):
        toy_trainer(data=3)


def test_two_evaluators_of_one_name_are_refused() -> None:
    cfg = toy_config()
    with pytest.raises(ConfigError, match="a name of its own"):
        cfg.set(evaluators=cfg.evaluators * 2).build(held_out=lambda most, task: ())


def test_a_pipeline_axis_whose_devices_would_all_do_the_same_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"2 devices on its pipeline axis, and model.decoder \(Repeat\) has no pipeline"
    ):
        toy_trainer(data=4, pipeline=2)
