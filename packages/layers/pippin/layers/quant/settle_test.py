"""Models that were trained with rounded weights, and what is stored of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.config_tree import override
from pippin.core.module import flatten_params, merge, split
from pippin.core.quantized_array import Palettized
from pippin.layers import configs
from pippin.layers.linear_config import LinearConfig
from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.layers.quant.settle import factor_paths, settled, settled_config

_PLAIN = configs.CausalLMConfig(
    vocab_size=32,
    dim=16,
    decoder=configs.RepeatConfig(
        num_layers=2,
        layer=configs.TransformerLayerConfig(
            attention=configs.GroupedQueryAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
            feed_forward=configs.FeedForwardConfig(hidden_dim=32),
        ),
    ),
)
_TOKENS = jnp.array([[1, 30, 7, 2]], jnp.int32)


def _logits(cfg, params):
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    return jax.jit(lambda p: merge(definition, p)(_TOKENS))(jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("head", [None, LinearConfig()], ids=["tied", "with a head"])
def test_a_stored_model_computes_what_the_trained_one_did(tmp_path, head):
    cfg = fake_quantized(int8_cache=False)(_PLAIN.set(head=head))
    _, params = split(cfg.build(rngs=nnx.Rngs(3)))
    tree, stored = settled(cfg, params)
    kept = flatten_params(stored)
    assert {path for path, a in kept.items() if isinstance(a, Palettized)} == {
        path for path in kept if path.endswith(".weight")
    }
    assert kept["embedding.weight"].bits == 4 and kept["decoder.layers.1.attention.q_proj.weight"].bits == 2
    save_bundle(tmp_path / "stored", tree, stored)
    # The same numbers; products are summed by other programs.
    np.testing.assert_allclose(
        _logits(tree, load_bundle(tmp_path / "stored").params()), _logits(cfg, params), rtol=1e-5, atol=1e-5
    )


def test_a_model_without_rounding_keeps_its_weights():
    _, params = split(_PLAIN.build(rngs=nnx.Rngs(3)))
    _, kept = settled(_PLAIN, params)
    assert not any(isinstance(a, Palettized) for a in flatten_params(kept).values())


def test_the_layers_that_do_not_round_are_those_of_before():
    cfg = override(_PLAIN, {"decoder.layer.feed_forward.hidden_dim": 48})
    assert settled_config(fake_quantized()(cfg)) == cfg


def test_factors_are_found_by_their_paths():
    paths = factor_paths(fake_quantized()(_PLAIN))
    assert "embedding.factor" in paths and "decoder.layer.attention.q_proj.factor" in paths
    assert len(paths) == 8 and not factor_paths(_PLAIN)
