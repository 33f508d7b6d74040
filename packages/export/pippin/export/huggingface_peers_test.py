"""transformers loads the folders that are written, and computes our logits."""

import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.module import merge, split
from pippin.export.huggingface import export_huggingface
from pippin.export.stacked_model import stacked_model
from pippin.export.tiny_models import CONFIGS, VOCAB_SIZE, random_params, save_tiny
from pippin.layers.huggingface import load_huggingface
from pippin.layers.unrolled import unrolled

_TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 24)).astype(np.int32)
_TOLERANCE = 1e-4  # of logits up to 20: both compute in float32
_APART = "tied without stacks"


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
    np.save(folder / "tokens.npy", _TOKENS)
    script = Path(__file__).with_name("huggingface_reference.py")
    command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(script), str(folder)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(bundles)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return folder


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
