"""Tests of whole models: which weight is stored how, under each recipe."""

import numpy as np
import pytest

from pippin.core.config_tree import override, replace
from pippin.core.errors import ConfigError, QuantizationError
from pippin.core.module import flatten_params, unflatten_params
from pippin.core.quantized_array import Palettized, Scaled
from pippin.export.compress.compress import compress, needs_calibration
from pippin.export.compress.config import TextConfig
from pippin.export.compress.recipes import RECIPES, recipe
from pippin.export.compress.testing import make_tokenizer, random_params, tiny_config
from pippin.export.compress.text import batches, calibration_text
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.linear_config import lora
from pippin.layers.moe_config import MoEConfig
from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.layers.quant.settle import settled
from pippin.layers.unrolled import unrolled


def compressed(tmp_path, cfg, name, changes=None):
    text = batches(
        TextConfig(tokens=64, sequence_length=32), calibration_text(), make_tokenizer(tmp_path / "t")
    )
    params = random_params(cfg)
    steps = []
    found = compress(
        cfg, params, override(recipe(name), changes or {}), text, lambda *step: steps.append(step)
    )
    assert steps[-1][1] == steps[-1][2]
    assert flatten_params(found.params).keys() == flatten_params(unrolled(cfg, params)[1]).keys()
    return found, params


# Of recipes, the largest relative error of a matrix.
_ERRORS = {
    "palettize_4bit": 0.15,
    "palettize_2bit": 0.5,
    "mixed_3_7": 0.5,
    "mixed_3_5": 0.5,
    "int8": 0.01,
    "int4_block32": 0.15,
    "float16": 1e-3,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_compresses_every_matrix(tmp_path, name):
    # The tables of so small a model weigh as much as its indices.
    changes = {"linear.bits_per_weight": 9.0} if name.startswith("mixed") else {}
    found, params = compressed(tmp_path, tiny_config(tied=False), name, changes)
    _, before = unrolled(tiny_config(tied=False), params)
    after = flatten_params(found.floats())
    most = _ERRORS[name]
    for path, weight in flatten_params(before).items():
        error = np.sqrt(np.square(after[path] - weight).sum() / np.square(weight).sum())
        assert error < most, path
    stored = flatten_params(found.params)
    kinds = {type(stored[path]) for path in stored if path.endswith("proj.weight")}
    expected = {"p": {Palettized}, "m": {Palettized}, "i": {Scaled}, "f": {np.ndarray}}
    assert kinds == expected[name[0]]
    assert stored["norm.scale"].dtype == np.float16
    if name != "float16":
        assert stored["embedding.weight"].scales.shape == (320, 1)
        assert stored["head.weight"].scales.shape == (1, 320)
    sizes = {w.name: w for w in found.weights}
    assert sizes["embedding.weight"].kind == "embedding"
    assert sizes["head.weight"].kind == "head"
    assert sizes["decoder.layers.1.attention.o_proj.weight"].kind == "attention"
    assert sizes["decoder.layers.1.feed_forward.up_proj.weight"].kind == "feed_forward"
    assert all(w.nbytes == stored[w.name].nbytes for w in found.weights)


def test_an_average_is_met_and_no_more(tmp_path):
    found, _ = compressed(tmp_path, tiny_config(), "mixed_3_7", {"linear.bits_per_weight": 7.0})
    linear = [w for w in found.weights if w.scheme == "palette"]
    assert len({w.bits for w in linear}) > 1
    bits = 8 * sum(w.nbytes for w in linear) / sum(w.count for w in linear)
    assert 6.8 < bits <= 7


def test_routers_and_loras_stay_and_experts_are_compressed(tmp_path):
    cfg = lora(rank=2)(replace(tiny_config(), FeedForwardConfig, MoEConfig(num_experts=2, top_k=1)))
    stored = flatten_params(compressed(tmp_path, cfg, "palettize_4bit")[0].params)
    layer = "decoder.layers.0"
    assert isinstance(stored[f"{layer}.attention.q_proj.base.weight"], Palettized)
    assert stored[f"{layer}.attention.q_proj.down"].dtype == np.float16
    assert stored[f"{layer}.feed_forward.gate_proj.weight"].groups == (2, 1, 4)
    routers = [v for path, v in stored.items() if ".router." in path]
    assert routers
    assert all(isinstance(v, np.ndarray) for v in routers)


def test_only_some_recipes_need_text():
    assert {name for name, cfg in RECIPES.items() if not needs_calibration(cfg)} == {
        "int8",
        "float16",
    }
    assert not needs_calibration(override(recipe("palettize_4bit"), {"linear.weighting": "none"}))
    cfg = tiny_config()
    with pytest.raises(ConfigError, match="give it text"):
        compress(cfg, random_params(cfg), recipe("palettize_4bit"))


def test_what_cannot_be_is_refused(tmp_path):
    cfg = tiny_config()
    with pytest.raises(
        QuantizationError, match=r"k_proj.weight is \[32, 16\], whose outputs \(16\) do not split"
    ):
        compressed(tmp_path, cfg, "palettize_4bit", {"linear.group_size": 24})
    with pytest.raises(ConfigError, match="the average asked for allows"):
        compressed(tmp_path / "b", cfg, "mixed_3_7", {"linear.bits_per_weight": 2.0})
    flat = flatten_params(random_params(cfg))
    flat["norm.scale"] = np.full_like(flat["norm.scale"], np.nan)
    with pytest.raises(QuantizationError, match="norm.scale holds NaN"):
        compress(cfg, unflatten_params(flat), recipe("int8"))
    with pytest.raises(ConfigError, match="no recipe 'paletize_4bit'.*did you mean 'palettize_4bit'"):
        recipe("paletize_4bit")


@pytest.mark.parametrize("name", ["float16", "mixed_3_7"])
def test_weights_that_were_rounded_in_training_stay_what_they_were_rounded_to(tmp_path, name):
    cfg = fake_quantized(bits=2, embedding_bits=4, int8_cache=False)(tiny_config())
    params = random_params(cfg)
    text = batches(
        TextConfig(tokens=64, sequence_length=32), calibration_text(), make_tokenizer(tmp_path / "t")
    )
    found = compress(cfg, params, recipe(name), text)
    stored = flatten_params(found.params)
    for path, values in flatten_params(settled(cfg, params)[1]).items():
        if isinstance(values, Palettized):
            assert np.array_equal(stored[path].dequantized(), values.dequantized())
    assert {w.bits for w in found.weights} == {2, 4, 16}
