"""Maps of an adapter, taken apart by layers without the model, are those that the model's own config gives."""

import numpy as np
import pytest
from flax import nnx

from pippin.core.adapter import LowRank
from pippin.core.config import Config
from pippin.core.module import flatten_params, parameter_infos, unflatten_params
from pippin.export.adapter_stacks import maps_by_layer
from pippin.export.lower_testing import SHARED_KEYS, TINY
from pippin.layers import configs as c
from pippin.layers.adapter import unrolled_maps
from pippin.layers.unrolled import unrolled_config

_LAYER = TINY.decoder.layer  # type: ignore[attr-defined]


def _stack(*layers: Config) -> c.CausalLMConfig:
    return TINY.set(decoder=c.SequenceConfig(layers=layers))


_MODELS = {
    "one stack": TINY,
    "no stack": _stack(_LAYER, _LAYER, _LAYER),
    "stacks in a sequence": _stack(
        c.RepeatConfig(layer=_LAYER, num_layers=2), _LAYER, c.RepeatConfig(layer=_LAYER, num_layers=3)
    ),
    "a sequence in a stack": TINY.set(
        decoder=c.RepeatConfig(layer=c.SequenceConfig(layers=(_LAYER, _LAYER)), num_layers=2)
    ),
    "shared keys": SHARED_KEYS,
}


def _maps(cfg: c.CausalLMConfig) -> tuple[dict[str, LowRank], dict[str, None]]:
    """A map for each linear map of the layers, and what stands for the parameters."""
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(0)
    maps = {}
    for path, info in infos.items():
        if path.startswith("decoder.") and path.endswith(".weight") and info.provides[-1] == "linear":
            *stacks, inputs, outputs = info.shape
            shapes = (*stacks, inputs, 2), (*stacks, 2, outputs)
            maps[path.removesuffix(".weight")] = LowRank(*(rng.normal(size=shape) for shape in shapes))
    return maps, dict.fromkeys(infos)


@pytest.mark.parametrize("name", _MODELS)
def test_they_are_those_that_the_config_gives(name):
    cfg = _MODELS[name]
    maps, params = _maps(cfg)
    expected = unrolled_maps(cfg, unflatten_params(params), maps)
    got = maps_by_layer(maps, len(unrolled_config(cfg).decoder.layers))
    assert got is not None and got.keys() == expected.keys()
    for path, pair in expected.items():
        np.testing.assert_array_equal(got[path].down, pair.down)
        np.testing.assert_array_equal(got[path].up, pair.up)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("stacks in a sequence", "decoder.layers.0."),
        ("stacks in a sequence", "decoder.layers.2."),
        ("a sequence in a stack", "decoder.layer.layers.1."),
        ("shared keys", "decoder.source."),
    ],
)
def test_where_a_part_of_the_model_has_no_map_nobody_can_tell(name, left_out):
    cfg = _MODELS[name]
    maps = {path: pair for path, pair in _maps(cfg)[0].items() if not path.startswith(left_out)}
    assert maps_by_layer(maps, len(unrolled_config(cfg).decoder.layers)) is None


@pytest.mark.parametrize(
    "path", ["head", "decoder", "decoder.layer", "decoder.layers", "decoder.layer.layer.q_proj"]
)
def test_maps_that_lie_in_no_model_are_none(path):
    assert maps_by_layer({path: LowRank(np.ones((2, 8, 2)), np.ones((2, 2, 8)))}, 2) is None


def test_stacks_of_different_lengths_are_none():
    maps = {
        f"decoder.layer.{name}": LowRank(np.ones((length, 8, 2)), np.ones((length, 2, 8)))
        for name, length in (("q_proj", 2), ("k_proj", 3))
    }
    assert maps_by_layer(maps, 2) is None
