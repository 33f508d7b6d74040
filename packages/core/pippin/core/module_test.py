"""Modules taken apart into parameters and the facts of them, and put together again."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pippin.core.config import REQUIRED, Config, Required
from pippin.core.errors import ConfigError, ShardingError
from pippin.core.module import (
    Module,
    constant_init,
    flatten_params,
    merge,
    parameter,
    parameter_infos,
    split,
    unflatten_params,
)


class Scale(Module):
    class Config(Config, provides="norm"):
        dim: Required[int] = REQUIRED

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        self.scale = parameter(constant_init(2.0), rngs, (cfg.dim,), (None,), fan_in=1)

    def __call__(self, x):
        return x * self.scale[...]


class Group(nnx.Module):
    """A module that nobody configures."""

    def __init__(self, inner: nnx.Module):
        self.inner = inner


class Stack(Module):
    class Config(Config, provides="layer"):
        input_dim: Required[int] = REQUIRED
        scale: Scale.Config = Scale.Config()

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        make = cfg.scale.set(dim=cfg.input_dim).build
        self.layers = nnx.List([make(rngs=rngs) for _ in range(11)])
        self.group = Group(make(rngs=rngs))
        shape = (2, 3, cfg.input_dim, 4)
        axes = ("layers", "tracks", "embed", "mlp")
        self.weight = parameter(constant_init(0.5), rngs, shape, axes, fan_in=cfg.input_dim)
        self.factor = 3.0

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.factor * x


def build() -> Stack:
    return Stack.Config(input_dim=2).build(rngs=nnx.Rngs(0))


def test_split_gives_nested_dicts_of_arrays_and_merge_puts_them_back():
    model = build()
    definition, params = split(model)
    assert params["layers"]["10"]["scale"].tolist() == [2.0, 2.0]
    assert params["weight"].shape == (2, 3, 2, 4)
    x = jnp.ones(2)
    back = merge(definition, jax.tree.map(lambda p: p / 2.0, params))
    assert back(x).tolist() == [3.0, 3.0]
    assert model(x).tolist() == [3.0 * 2**11] * 2
    assert hash(definition) == hash(split(build())[0])


def test_layers_stay_in_their_order_past_ten():
    definition, params = split(build())
    for i in range(11):
        params["layers"][str(i)]["scale"] = jnp.full(2, i + 1.0)
    scales = [layer.scale[...][0].item() for layer in merge(definition, params).layers]
    assert scales == [float(i + 1) for i in range(11)]


def test_infos_are_a_tree_like_the_parameters():
    model = nnx.eval_shape(build)
    infos, params = parameter_infos(model), split(model)[1]
    assert jax.tree.structure(infos) == jax.tree.structure(params)
    assert [i.path for i in flatten_params(infos).values()] == list(flatten_params(infos))
    assert all(i.shape == flatten_params(params)[path].shape for path, i in flatten_params(infos).items())


def test_infos_name_the_components_that_hold_a_parameter():
    infos = flatten_params(parameter_infos(build()))
    scale = infos["layers.10.scale"]
    assert (scale.owners, scale.provides) == ((Stack.Config.TYPE, Scale.Config.TYPE), ("layer", "norm"))
    assert (scale.shape, scale.dtype, scale.axes, scale.stacked) == ((2,), jnp.float32, (None,), 0)
    assert infos["group.inner.scale"].provides == ("layer", "norm")
    assert infos["weight"].stacked == 2


def test_parameters_are_named_by_flat_paths_and_back():
    params = split(build())[1]
    flat = flatten_params(params)
    assert "layers.0.scale" in flat
    assert jax.tree.structure(unflatten_params(flat)) == jax.tree.structure(params)
    assert flatten_params({}) == {}
    assert unflatten_params({}) == {}


class Spoilt(Module):
    def __init__(self, **attributes: Any):
        for name, value in attributes.items():
            setattr(self, name, value)


def test_state_that_is_no_parameter_is_named():
    module = Spoilt(count=nnx.Variable(jnp.zeros(())), inner=Spoilt(mean=nnx.BatchStat(jnp.zeros(2))))
    with pytest.raises(
        ConfigError, match=r"Spoilt holds state that is not a parameter: count, inner\.mean\. Make it"
    ):
        split(module)


def test_a_parameter_without_logical_axes_is_named():
    with pytest.raises(
        ConfigError, match=r"the parameter inner\.weight has no logical axes.*pippin\.core\.module\.parameter"
    ):
        parameter_infos(Spoilt(inner=Spoilt(weight=nnx.Param(jnp.zeros(2)))))


def test_axes_are_known_and_one_for_each_dim():
    with pytest.raises(
        ShardingError, match=r"unknown logical axis 'embd' \(did you mean 'embed'\?\)\. Use one of batch,"
    ):
        parameter(constant_init(0.0), nnx.Rngs(0), (2,), ("embd",), fan_in=1)
    with pytest.raises(ConfigError, match=r"a parameter of shape \(2, 3\) got the logical axes \('embed',\)"):
        parameter(constant_init(0.0), nnx.Rngs(0), (2, 3), ("embed",), fan_in=1)
