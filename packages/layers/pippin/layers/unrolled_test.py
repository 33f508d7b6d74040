"""Models without loops over layers compute what they did with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.config_tree import override, traverse
from pippin.core.errors import ConfigError
from pippin.core.module import merge
from pippin.layers import configs
from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025
from pippin.layers.models.llama import smollm2_135m
from pippin.layers.testing import Parts, assert_close, parts
from pippin.layers.unrolled import unrolled, untied

_TINY = {"vocab_size": 64, "dim": 16, "num_heads": 4, "head_dim": 8}
_LLAMA = override(
    smollm2_135m(),
    {
        "vocab_size": 64,
        "dim": 16,
        "decoder.num_layers": 3,
        "decoder.layer.attention.num_kv_heads": 2,
        "decoder.layer.attention.num_heads": 4,
        "decoder.layer.attention.head_dim": 8,
        "decoder.layer.feed_forward.hidden_dim": 24,
    },
)
_PATTERN = _LLAMA.set(
    decoder=configs.RepeatConfig(
        num_layers=2, layer=configs.SequenceConfig(layers=(_LLAMA.decoder.layer, _LLAMA.decoder.layer))
    )
)
_MODELS = {
    "repeat": _LLAMA,
    "shared": afm_on_device_2025(**_TINY, num_layers=3, num_readers=2, num_kv_heads=2, hidden_dim=24),
    "pattern": _PATTERN,
    "tracks": _LLAMA.set(decoder=configs.ParallelTracksConfig(num_tracks=2, layer=_LLAMA.decoder)),
}
_TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 7)), jnp.int32)


def _call(cfg, params):
    definition = parts(cfg, dtype=np.float32).definition
    return jax.jit(lambda p: merge(definition, p)(_TOKENS))(params)


@pytest.mark.parametrize("name", _MODELS)
def test_the_logits_are_the_same(name):
    cfg = _MODELS[name]
    before: Parts = parts(cfg, dtype=np.float32)
    changed, params = unrolled(cfg, before.params)
    assert_close(_call(changed, params), before.call(before.params, _TOKENS))


@pytest.mark.parametrize(("name", "layers"), [("repeat", 3), ("shared", 5), ("pattern", 4)])
def test_each_layer_is_one_of_a_sequence(name, layers):
    cfg = _MODELS[name]
    changed, _ = unrolled(cfg, parts(cfg, dtype=np.float32).params)
    assert isinstance(changed.decoder, configs.SequenceConfig)
    assert len(changed.decoder.layers) == layers
    assert not [c for _, c in traverse(changed) if isinstance(c, configs.RepeatConfig)]


_LAYER = _LLAMA.decoder.layer
_READER = _LAYER.set(attention=configs.SharedKVAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8))
_SEQUENCES = {
    "a reader behind its maker": ((_LAYER, _READER, _READER), None),
    "behind a loop of readers": ((_LAYER, configs.RepeatConfig(num_layers=2, layer=_READER), _READER), None),
    "behind a loop and a maker": ((_LLAMA.decoder, _LAYER, _READER), None),
    "behind a loop": ((_LAYER, _LLAMA.decoder, _READER), "layer 4 reads the keys and values of layer 0"),
    "behind a loop in a sequence": (
        (configs.SequenceConfig(layers=(_LAYER, _LLAMA.decoder)), _READER),
        "layer 4 reads the keys and values of layer 0",
    ),
    "in a loop before a maker": (
        (_LAYER, configs.RepeatConfig(num_layers=2, layer=configs.SequenceConfig(layers=(_READER, _LAYER)))),
        "layer 3 reads the keys and values of layer 0",
    ),
}


@pytest.mark.parametrize("name", _SEQUENCES)
def test_a_reader_reads_the_same_layer_or_the_model_is_refused(name):
    layers, problem = _SEQUENCES[name]
    cfg = _LLAMA.set(decoder=configs.SequenceConfig(layers=layers))
    before: Parts = parts(cfg, dtype=np.float32)
    if problem is not None:
        with pytest.raises(ConfigError, match=problem):
            unrolled(cfg, before.params)
        return
    changed, params = unrolled(cfg, before.params)
    assert_close(_call(changed, params), before.call(before.params, _TOKENS))


def test_a_head_of_its_own_gives_the_logits_of_the_embedding():
    before = parts(_LLAMA, dtype=np.float32)
    changed, params = untied(_LLAMA, before.params)
    assert isinstance(changed.head, configs.LinearConfig)
    assert_close(_call(changed, params), before.call(before.params, _TOKENS))


def test_a_model_with_a_head_stays_as_it_is():
    cfg = _LLAMA.set(head=configs.LinearConfig())
    params = parts(cfg, dtype=np.float32).params
    assert untied(cfg, params) == (cfg, params)
