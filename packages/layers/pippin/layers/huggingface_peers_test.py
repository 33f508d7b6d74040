"""Logits equal those of transformers on the same weights, whichever of the two wrote them."""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from pippin.core.config_tree import override
from pippin.core.module import merge, split
from pippin.layers.attention_config import QKNormOrder
from pippin.layers.huggingface import HuggingFaceModel, load_huggingface, save_huggingface
from pippin.layers.models.llama import llama, with_qk_norm
from pippin.layers.position_config import Llama3ScalingConfig, RoPEConfig

_SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
_LLAMA = _SIZES | {"model_type": "llama", "torch_dtype": "float32", "rms_norm_eps": 1e-5}
_SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SPECS = {
    "smollm2": _LLAMA
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
    },
    "llama3.1": _LLAMA
    | {
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "rope_theta": 500_000.0,
        "rope_scaling": _SCALED,
    },
    "biases": _LLAMA | {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True},
    "qwen3": _SIZES
    | {
        "model_type": "qwen3",
        "torch_dtype": "float32",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
    },
    "bfloat16": _LLAMA | {"num_hidden_layers": 2, "num_key_value_heads": 1, "torch_dtype": "bfloat16"},
}
_TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)
_TOLERANCE = 1e-4


def _transformers(verb: str, folder: Path) -> None:
    """Runs huggingface_reference.py on a folder."""
    np.save(folder / "tokens.npy", _TOKENS)
    script = Path(__file__).with_name("huggingface_reference.py")
    command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(script), verb, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder of models that transformers wrote, each with its logits beside it."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "specs.json").write_text(json.dumps(SPECS))
    _transformers("make", folder)
    return folder


def _our_configs():
    sizes = {"vocab_size": 96, "dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_dim": 64}
    scaling = Llama3ScalingConfig(original_context=16)
    tied = llama(**sizes, num_layers=2, tied=True, position=RoPEConfig())
    return {
        "tied": tied,
        "scaled": llama(**sizes, num_layers=2, tied=False, position=RoPEConfig(scaling=scaling)),
        "normed": with_qk_norm(tied),
    }


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> tuple[Path, dict[str, HuggingFaceModel]]:
    """A folder of models that we wrote, with the logits of transformers beside each, and what was written."""
    folder = tmp_path_factory.mktemp("ours")
    models = {name: load_huggingface(theirs / name) for name in SPECS}
    for i, (name, cfg) in enumerate(_our_configs().items()):
        models[name] = HuggingFaceModel(cfg, split(cfg.build(rngs=nnx.Rngs(i)))[1], None)
    for name, model in models.items():
        save_huggingface(folder / name, model.config, model.params, max_file_bytes=30_000)
    _transformers("read", folder)
    return folder, models


def _logits(model: HuggingFaceModel) -> np.ndarray:
    definition, _ = split(nnx.eval_shape(lambda: model.config.build(rngs=nnx.Rngs(0))))
    return np.asarray(jax.jit(lambda p, t: merge(definition, p)(t))(model.params, _TOKENS))


@pytest.mark.parametrize("name", SPECS)
def test_their_model_has_their_logits(name, theirs):
    np.testing.assert_allclose(
        _logits(load_huggingface(theirs / name)), np.load(theirs / f"{name}.npy"), rtol=0, atol=_TOLERANCE
    )


@pytest.mark.parametrize("name", [*SPECS, *_our_configs()])
def test_what_we_write_they_read(name, ours):
    folder, models = ours
    np.testing.assert_allclose(
        np.load(folder / f"{name}.npy"), _logits(models[name]), rtol=0, atol=_TOLERANCE
    )


@pytest.mark.parametrize("name", SPECS)
def test_their_tensors_are_the_same_after_both_ways(name, theirs, ours):
    before, after = ({}, {})
    for tensors, folder in ((before, theirs), (after, ours[0])):
        for file in (folder / name).glob("*.safetensors"):
            tensors |= safetensors.numpy.load_file(file)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert after[tensor].dtype == value.dtype and after[tensor].shape == value.shape
        assert after[tensor].tobytes() == value.tobytes(), tensor


def test_the_tolerance_tells_architectures_apart(theirs):
    """Each of these differs from transformers by far more than the tolerance."""
    attention = "decoder.layer.attention"
    wrong = {
        "qwen3": {f"{attention}.qk_norm_order": QKNormOrder.AFTER_ROTATION},
        "llama3.1": {f"{attention}.position.scaling": None},
        "smollm2": {f"{attention}.position.theta": 90_000.0},
    }
    for name, change in wrong.items():
        model = load_huggingface(theirs / name)
        logits = _logits(HuggingFaceModel(override(model.config, change), model.params, None))
        assert np.abs(logits - np.load(theirs / f"{name}.npy")).max() > 100 * _TOLERANCE
