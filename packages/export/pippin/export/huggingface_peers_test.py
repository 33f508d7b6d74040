"""transformers loads the folders that are written, and computes our logits."""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.module import Params, merge, split
from pippin.core.tokenizer import load_tokenizer
from pippin.export.huggingface import export_huggingface
from pippin.export.stacked_model import stacked_model
from pippin.export.tiny_models import CONFIGS, VOCAB_SIZE, random_params, save_sentencepiece, save_tiny
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.huggingface import load_huggingface
from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.layers.unrolled import unrolled

_TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 24)).astype(np.int32)
_TOLERANCE = 1e-4  # of logits up to 20: both compute in float32
_APART = "tied without stacks"
_SENTENCEPIECE = "tied with SentencePiece"
_ROUNDED = "tied, rounded in training"
_TEXTS = ["def main(): return 12", "it's  日本語 Ünïcödé\r\n\n", " \t7"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports, with the logits of transformers beside each."""
    folder = tmp_path_factory.mktemp("exported")
    bundles = tmp_path_factory.mktemp("bundles")
    for name in CONFIGS:
        model = stacked_model(load_bundle(save_tiny(bundles / name, name)))
        for dtype in ("float32", "float16"):
            export_huggingface(model, folder / f"{name}-{dtype}", dtype=dtype)
    cfg, params = unrolled(CONFIGS["tied"], random_params("tied"))
    apart = save_bundle(bundles / "apart", cfg, params, tokenizer=bundles / "tied.tokenizer")
    export_huggingface(stacked_model(load_bundle(apart)), folder / _APART)
    pieces = save_sentencepiece(bundles / "pieces")
    with_pieces = save_tiny(bundles / "with_pieces", tokenizer=pieces)
    export_huggingface(stacked_model(load_bundle(with_pieces)), folder / _SENTENCEPIECE)
    cfg, params = _rounded()
    rounded = save_bundle(bundles / "rounded", cfg, params, tokenizer=bundles / "tied.tokenizer")
    export_huggingface(stacked_model(load_bundle(rounded)), folder / _ROUNDED)
    np.save(folder / "tokens.npy", _TOKENS)
    (folder / "texts.json").write_text(json.dumps(_TEXTS))
    script = Path(__file__).with_name("huggingface_reference.py")
    command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(script), str(folder)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(bundles)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return folder


def _rounded() -> tuple[CausalLMConfig, Params]:
    """A model as training with rounded weights has it."""
    cfg = fake_quantized(bits=2, embedding_bits=4, int8_cache=False)(CONFIGS["tied"])
    _, params = split(cfg.build(rngs=nnx.Rngs(0)))
    return cfg, jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_ours(name: str, exported: Path) -> None:
    definition, _ = split(nnx.eval_shape(lambda: CONFIGS[name].build(rngs=nnx.Rngs(0))))
    run = jax.jit(lambda params, tokens: merge(definition, params)(tokens))
    for dtype in ("float32", "float16"):
        params = jax.tree.map(
            lambda a: a.astype(np.float32), load_huggingface(exported / f"{name}-{dtype}").params
        )
        ours, theirs = np.asarray(run(params, _TOKENS)), np.load(exported / f"{name}-{dtype}.npy")
        print(
            f"{name} {dtype}: logits differ by {np.abs(ours - theirs).max():.1e} of {np.abs(ours).max():.0f}"
        )
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=_TOLERANCE)


def test_a_model_without_stacks_has_the_same(exported: Path) -> None:
    np.testing.assert_array_equal(np.load(exported / f"{_APART}.npy"), np.load(exported / "tied-float32.npy"))


def test_a_model_computes_what_it_did_when_its_weights_were_rounded_in_training(exported: Path) -> None:
    cfg, params = _rounded()
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    ours = np.asarray(jax.jit(lambda params, tokens: merge(definition, params)(tokens))(params, _TOKENS))
    # The scales of the weights are float16 in what is exported.
    np.testing.assert_allclose(np.load(exported / f"{_ROUNDED}.npy"), ours, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", [_SENTENCEPIECE, "tied-float32"])
def test_its_tokenizer_gives_our_tokens(name: str, exported: Path) -> None:
    ours, theirs = load_tokenizer(exported / name), json.loads((exported / f"{name}.json").read_text())
    assert theirs["ids"] == [[*ours.start_ids, *ours.encode(text)] for text in _TEXTS]
    assert theirs["texts"] == _TEXTS
    stops = theirs["stops at"]
    assert theirs["eos"] == ours.eos_id and set(stops if isinstance(stops, list) else [stops]) == ours.eos_ids
