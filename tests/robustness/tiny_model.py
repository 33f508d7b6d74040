"""A model of a few thousand random parameters, whose greedy answers hang on the last bit of every sum."""

import functools
from pathlib import Path

import numpy as np
from flax import nnx

from pippin.core.bundle import save_bundle
from pippin.core.config_tree import override
from pippin.core.module import flatten_params, parameter_infos, unflatten_params
from pippin.layers.models.llama import smollm2_135m
from pippin.serve.tokenizer_testing import TEMPLATE, save_tokenizer

CONFIG = override(
    smollm2_135m(),
    {
        "vocab_size": 272,
        "dim": 16,
        "decoder.num_layers": 2,
        "decoder.layer.attention.num_kv_heads": 1,
        "decoder.layer.attention.num_heads": 2,
        "decoder.layer.attention.head_dim": 8,
        "decoder.layer.feed_forward.hidden_dim": 24,
    },
)


@functools.cache
def parameters() -> dict:
    """Its parameters, always the same."""
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(0)
    return unflatten_params({p: rng.normal(size=i.shape).astype(np.float32) for p, i in infos.items()})


def save_model(folder: Path) -> Path:
    """Its bundle in a folder, with a tokenizer of bytes."""
    tokenizer = save_tokenizer(folder / "tokenizer", chat_template=TEMPLATE, add_bos_token=False)
    return save_bundle(folder / "tiny", CONFIG, parameters(), tokenizer=tokenizer)
