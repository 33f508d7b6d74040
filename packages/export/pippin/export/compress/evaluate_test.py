"""Tests of perplexity: of models whose loss is known."""

import math

import jax
import numpy as np
import pytest

from pippin.export.compress.config import TextConfig
from pippin.export.compress.evaluate import Evaluator
from pippin.export.compress.testing import VOCAB_SIZE, make_tokenizer, random_params, tiny_config
from pippin.export.compress.text import batches, evaluation_text
from pippin.layers.unrolled import unrolled


def test_a_model_that_knows_nothing_has_the_vocabulary_s_size(tmp_path):
    cfg = tiny_config()
    text = batches(
        TextConfig(tokens=64, sequence_length=32), evaluation_text(), make_tokenizer(tmp_path / "t")
    )
    evaluator = Evaluator(cfg, text)
    assert evaluator.tokens == 64
    assert len(evaluator) == 2
    params = random_params(cfg)
    zeros = jax.tree.map(np.zeros_like, params)
    steps = []
    assert evaluator.perplexity(zeros, lambda: steps.append(1)) == pytest.approx(VOCAB_SIZE, rel=1e-5)
    assert len(steps) == 2
    # The same model in another structure and another type.
    component, tree = unrolled(cfg, params)
    halves = jax.tree.map(lambda a: np.asarray(a, np.float16), tree)
    assert Evaluator(component, text).perplexity(halves) == pytest.approx(
        evaluator.perplexity(params), rel=0.01
    )
    loud = {**params, "embedding": {"weight": params["embedding"]["weight"] * 1e6}}
    assert evaluator.perplexity(loud) == math.inf
