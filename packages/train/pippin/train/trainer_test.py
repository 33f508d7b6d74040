"""Run with 8 devices (see BUILD): the same training on every mesh."""

import itertools

import jax
import numpy as np
import pytest

from pippin.core.config_tree import override
from pippin.core.errors import ConfigError, ShardingError
from pippin.train.step import TrainState, make_step
from pippin.train.toy import CountingInput, toy_config
from pippin.train.trainer import Trainer

_STEPS = 3


def toy_trainer(**mesh: int) -> Trainer:
    changes = {f"mesh.{axis}": n for axis, n in mesh.items()}
    # Two key heads, so that a tensor axis of 2 can split them.
    heads = {"model.decoder.layer.attention.num_kv_heads": 2}
    return override(toy_config(), changes | heads).build(held_out=lambda most, task: ())


def trained(trainer: Trainer) -> tuple[TrainState, list[float]]:
    """The state and the losses after some steps."""
    state = trainer.init(CountingInput(trainer.cfg.input).tokenizer_dir)
    step, losses = trainer.compile(), []
    for batch in itertools.islice(batches(), _STEPS):
        state, metrics = step(state, trainer.place(batch))
        losses.append(float(metrics["loss"]))
    return state, losses


def batches():
    source = CountingInput(toy_config().input)
    return iter(lambda: next(source), None)


@pytest.fixture(scope="module")
def one_device() -> tuple[TrainState, list[float]]:
    """The same steps by a plain jit, without a mesh."""
    trainer = toy_trainer()
    state = jax.jit(trainer._init)()
    step, losses = jax.jit(make_step(trainer.definition, trainer.learner, 1)), []
    for batch in itertools.islice(batches(), _STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_mesh_trains_as_one_device_does(
    one_device: tuple[TrainState, list[float]], sizes: dict[str, int]
) -> None:
    assert jax.device_count() == 8
    state, losses = trained(toy_trainer(**sizes))
    # Sums over 8 devices are added in another order: a few float32 roundings in each of three Adam steps.
    np.testing.assert_allclose(losses, one_device[1], rtol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state.params, one_device[0].params
    )


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
