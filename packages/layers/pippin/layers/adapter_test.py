"""Adapters: what is taken out of a model with LoRA, and what a model with room for many computes with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.adapter import LowRank, load_adapter
from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError
from pippin.core.module import flatten_params, merge, split
from pippin.layers import configs
from pippin.layers.adapter import adapter_of, main, model_signature, unrolled_maps
from pippin.layers.linear_config import lora, multi_lora
from pippin.layers.linear_multi_lora import adapter_shapes, assign_adapters, with_adapter, with_room
from pippin.layers.models.llama import smollm2_135m
from pippin.layers.testing import assert_close, parts
from pippin.layers.unrolled import unrolled

_BASE = override(
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
_TUNED = lora(rank=2, alpha=3.0, only="attention")(_BASE)
_TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 7)), jnp.int32)


def _tuned_params() -> dict:
    """With LoRA maps that are not zero."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(np.asarray, parts(_TUNED, dtype=np.float32).params)

    def filled(node):
        if "down" not in node:
            return {k: filled(v) if isinstance(v, dict) else v for k, v in node.items()}
        return {
            k: v if k == "base" else rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in node.items()
        }

    return filled(params)


def _base_params(params: dict) -> dict:
    """Those of the model without LoRA."""
    if "down" in params:
        return params["base"]
    return {k: _base_params(v) if isinstance(v, dict) else v for k, v in params.items()}


def _logits(cfg, params):
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    return jax.jit(lambda p: merge(definition, p)(_TOKENS))(params)


def test_an_adapter_on_its_base_is_the_model_that_it_came_from(tmp_path):
    tuned = _tuned_params()
    base = _base_params(tuned)
    maps, signature = adapter_of(load_bundle(save_bundle(tmp_path / "tuned", _TUNED, tuned)))
    assert signature == model_signature(base)
    assert set(maps) == {f"decoder.layer.attention.{n}_proj" for n in "qkvo"}
    flat_cfg, flat_params = unrolled(_BASE, base)
    roomy = multi_lora(num_adapters=2, rank=4)(flat_cfg)
    full = with_room(flat_params, parts(roomy, dtype=np.float32).params)
    assert len(adapter_shapes(full)) == 3 * 7
    full = with_adapter(full, 2, unrolled_maps(_BASE, base, maps))
    got = _logits(roomy, assign_adapters(full, jnp.asarray([0, 2, 0], jnp.int32)))
    before, after = _logits(_BASE, base), _logits(_TUNED, tuned)
    assert_close(got[1], after[1])
    assert_close(got[::2], before[::2])
    assert float(jnp.max(jnp.abs(before[1] - after[1]))) > 1e-3, "the adapter does something"


def test_the_signature_is_the_models_own_and_not_anothers():
    base = _base_params(_tuned_params())
    changed = jax.tree.map(np.copy, base)
    changed["norm"]["scale"][3] += 1e-6
    assert model_signature(base) != model_signature(changed)
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), base)
    same_numbers = jax.tree.map(lambda a: a.astype(np.float32), halves)
    assert model_signature(halves) == model_signature(same_numbers)


def test_maps_for_what_the_model_does_not_have_are_refused():
    base = _base_params(_tuned_params())
    maps = {"decoder.layer.mlp": LowRank(np.zeros((3, 2, 1)), np.zeros((3, 1, 2)))}
    with pytest.raises(CheckpointError, match="decoder.layer.mlp, which the model does not have"):
        unrolled_maps(_BASE, base, maps)


def test_the_command_writes_an_adapter(tmp_path, capsys):
    tuned = _tuned_params()
    bundle = save_bundle(tmp_path / "tuned", _TUNED, tuned)
    assert main(["--model", str(bundle), "--out", str(tmp_path / "sums")]) == 0
    assert "sums: rank 2, 4 linear maps" in capsys.readouterr().out
    adapter = load_adapter(tmp_path / "sums")
    expected = flatten_params(tuned)["decoder.layer.attention.q_proj.up"] * 1.5
    np.testing.assert_allclose(adapter.maps()["decoder.layer.attention.q_proj"].up, expected, rtol=1e-6)


def test_a_model_without_lora_and_a_directory_without_a_model_are_told(tmp_path, capsys):
    bundle = save_bundle(
        tmp_path / "plain", configs.LinearConfig(input_dim=2, output_dim=2), {"weight": np.ones((2, 2))}
    )
    assert main(["--model", str(bundle), "--out", str(tmp_path / "a")]) == 2
    assert "has no LoRA layers" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "absent"), "--out", str(tmp_path / "a")]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
