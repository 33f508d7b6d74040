"""A model of a few thousand random parameters, whose greedy answers hang on the last bit of every sum."""

import functools
from pathlib import Path

import numpy as np
from flax import nnx

from pippin.core.adapter import LowRank, save_adapter
from pippin.core.bundle import save_bundle
from pippin.core.config_tree import override
from pippin.core.module import flatten_params, parameter_infos, unflatten_params
from pippin.layers.adapter import model_signature
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
        "decoder.layer.attention.head_dim": 16,  # with less, bits depend on the batch: decision 13
        "decoder.layer.feed_forward.hidden_dim": 24,
    },
)


@functools.cache
def parameters(seed: int = 0, nearly: float = 0.0) -> dict:
    """Its parameters, always the same of a seed; `nearly`: so far from those of another model, the same in all else."""
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0)))))
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    values = {p: rng.normal(size=i.shape) for p, i in infos.items()}
    near = {p: v + nearly * other.normal(size=v.shape) for p, v in values.items()}
    return unflatten_params({p: v.astype(np.float32) for p, v in near.items()})


def save_model(folder: Path, params: dict | None = None) -> Path:
    """Its bundle in a folder, with a tokenizer of bytes."""
    tokenizer = save_tokenizer(folder / "tokenizer", chat_template=TEMPLATE, add_bos_token=False)
    return save_bundle(folder / "tiny", CONFIG, params or parameters(), tokenizer=tokenizer)


def adapter_maps(seed: int, rank: int = 2) -> dict[str, LowRank]:
    """An adapter of all its linear maps that changes most answers."""
    rng = np.random.default_rng(seed)
    maps = {}
    for path, weight in flatten_params(parameters()).items():
        if path.startswith("decoder.") and path.endswith(".weight"):
            layers, inputs, outputs = weight.shape
            down, up = rng.normal(size=(layers, inputs, rank)), rng.normal(size=(layers, rank, outputs))
            maps[path.removesuffix(".weight")] = LowRank(0.5 * down.astype(np.float32), up.astype(np.float32))
    return maps


def base() -> str:
    """What its adapters were made for."""
    return model_signature(parameters())


def save_adapters(folder: Path, *names: str) -> Path:
    """Adapters of it in a folder, all different."""
    for seed, name in enumerate(names):
        save_adapter(folder / name, adapter_maps(seed), base())
    return folder
