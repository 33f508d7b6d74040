"""A saved program for Core AI, run by Apple's own runtime, computes what its model does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pippin.core.config_tree import override, replace
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.quantized_array import Palettized, Scaled
from pippin.export import lower_testing as t
from pippin.export.coreai_testing import run
from pippin.export.lower_coreai import lower_coreai
from pippin.layers import configs as c
from pippin.layers.models.llama import with_qk_norm

# In float32, keys and values, tables of angles and logits are rounded to float16 all the same; logits are about 5.
TOLERANCE = {np.float32: 1.2e-2, np.float16: 6e-2}

_ATTENTION = "decoder.layer.attention"


def _changed(**fields: Any) -> Any:
    return override(t.TINY, {f"{_ATTENTION}.{name}": value for name, value in fields.items()})


_MODELS = {
    "llama": t.TINY,
    "untied, biases, capped logits": replace(
        override(t.TINY, {"head": c.LinearConfig(), "logit_soft_cap": 5.0}),
        c.LinearConfig,
        c.LinearConfig(bias=True),
    ),
    "lora": c.lora(4, 8.0)(t.TINY),
    "norm before rotation, gelu": override(
        with_qk_norm(t.TINY), {"decoder.layer.feed_forward.activation": c.Activation.GELU}
    ),
    "norm after rotation, window, relu": override(
        _changed(qk_norm=c.RMSNormConfig(), qk_norm_order=c.QKNormOrder.AFTER_ROTATION, window=9),
        {"decoder.layer.feed_forward.activation": c.Activation.RELU},
    ),
    "slower rotations": _changed(position=c.RoPEConfig(scaling=c.Llama3ScalingConfig(original_context=16))),
    "no positions, capped attention": _changed(position=c.NoPEConfig(), soft_cap=2.0),
    "alibi, sinks": _changed(position=c.ALiBiConfig(), sinks=True),
    "shared keys": t.SHARED_KEYS,
}


def _save(folder: Path, cfg: Any, params: Any, dtype: type = np.float16) -> tuple[Path, Any]:
    lowered = lower_coreai(cfg, params, t.SIZES, dtype=dtype)
    path = folder / f"{np.dtype(dtype).name}.aimodel"
    lowered.program.save_asset(path)
    return path, lowered


@pytest.mark.parametrize("name", _MODELS)
def test_a_program_computes_what_its_model_does(tmp_path: Path, name: str) -> None:
    made, tokens = t.model(_MODELS[name]), t.some_tokens(62)
    expected = t.reference(made.cfg, made.params, tokens)
    for dtype, tolerance in TOLERANCE.items():
        path, _ = _save(tmp_path, made.flat_cfg, made.flat, dtype)
        got, _ = run(path, tokens, prompt=58)
        print(f"{name} {dtype.__name__}: logits differ by {np.abs(got - expected).max():.1e} at most")
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def _compressed(made: t.Model) -> dict[str, Any]:
    """Every scheme and every number of bits."""
    rng = np.random.default_rng(3)

    def palette(shape: tuple[int, ...], bits: int, groups: tuple[int, ...]) -> Palettized:
        luts = 0.2 * rng.standard_normal((*groups, 2**bits))
        indices = rng.integers(0, 2**bits, shape).astype(np.uint8)
        return Palettized(indices, luts.astype(np.float16), bits)

    def scaled(shape: tuple[int, ...], bits: int, blocks: tuple[int, ...]) -> Scaled:
        most = 2 ** (bits - 1) - 1
        scales = rng.uniform(0.1, 0.3, blocks) / most
        return Scaled(rng.integers(-most, most + 1, shape).astype(np.int8), scales.astype(np.float16), bits)

    params: dict[str, Any] = dict(made.flat)
    for layer in "01":
        at = f"decoder.layers.{layer}"
        params[f"{at}.attention.q_proj.weight"] = palette((64, 64), 4, (1, 4))
        params[f"{at}.attention.k_proj.weight"] = palette((64, 32), 2, (4, 1))
        params[f"{at}.attention.v_proj.weight"] = palette((64, 32), 3 if layer == "0" else 1, (1, 1))
        params[f"{at}.attention.o_proj.weight"] = scaled((64, 64), 4, (2, 64))
        params[f"{at}.feed_forward.gate_proj.weight"] = palette((64, 96), 6, (1, 2))
        params[f"{at}.feed_forward.up_proj.weight"] = palette((64, 96), 8, (1, 1))
        params[f"{at}.feed_forward.down_proj.weight"] = scaled((96, 64), 8, (1, 64))
    params["embedding.weight"] = scaled((96, 64), 8, (96, 1))
    return params


def test_compressed_weights_go_in_as_they_are(tmp_path: Path) -> None:
    made, tokens = t.model(t.TINY), t.some_tokens(30)
    params = _compressed(made)
    floats = {n: v if isinstance(v, np.ndarray) else v.dequantized() for n, v in params.items()}
    expected = t.reference(made.flat_cfg, floats, tokens)
    for dtype, tolerance in TOLERANCE.items():
        path, _ = _save(tmp_path, made.flat_cfg, params, dtype)
        got, _ = run(path, tokens, prompt=26)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    lowered = lower_coreai(made.flat_cfg, params, t.SIZES)
    claimed = {w.name: (w.scheme, w.bits, w.bytes) for w in lowered.weights}
    assert claimed["decoder.layers.0.attention.q_proj.weight"] == ("palettized", 4, 64 * 64 // 2 + 4 * 16 * 2)
    assert claimed["embedding.weight"] == ("scaled", 8, 96 * 64 + 96 * 2)


def test_weights_are_stored_once_for_both_functions(tmp_path: Path) -> None:
    wide = override(t.TINY, {"vocab_size": 4096})
    made = t.model(wide)
    path, lowered = _save(tmp_path, made.flat_cfg, made.flat)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size < 1.15 * sum(weight.bytes for weight in lowered.weights)


def test_core_mls_package_computes_the_same(tmp_path: Path) -> None:
    """Two programs of one tree: one by Apple's kernels, one by an interpreter of the saved package."""
    made, tokens = t.model(_MODELS["shared keys"]), t.some_tokens(40)
    package, _ = t.save(tmp_path, made.flat_cfg, made.flat)
    path, _ = _save(tmp_path, made.flat_cfg, made.flat, np.float32)
    got, _ = run(path, tokens, prompt=30)
    other = t.run(package, tokens, prompt=30)
    np.testing.assert_allclose(got, other, rtol=0, atol=TOLERANCE[np.float32])
    np.testing.assert_array_equal(got.argmax(-1), other.argmax(-1))


def test_a_component_without_a_rule_is_named() -> None:
    cfg = override(t.TINY, {"decoder.layer.feed_forward": c.MoEConfig(num_experts=2, hidden_dim=8)})
    with pytest.raises(
        ConfigError, match=r"no rule that writes .*MoE.* for Core AI\. Rules are there for ALiBi, "
    ):
        lower_coreai(cfg, {}, t.SIZES)


def test_a_weight_that_is_no_number_is_named() -> None:
    made = t.model(t.TINY)
    made.flat["norm.scale"][3] = np.inf
    with pytest.raises(CheckpointError, match=r"norm.scale\[3\] is inf; a package holds finite numbers"):
        lower_coreai(made.flat_cfg, made.flat, t.SIZES)
