"""What the tests of compression share: a tiny model with a tokenizer."""

from pathlib import Path

import numpy as np
import tokenizers
from flax import nnx

from pippin.core.bundle import save_bundle
from pippin.core.module import Params, flatten_params, split, unflatten_params
from pippin.core.tokenizer import Tokenizer, load_tokenizer
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.llama import llama
from pippin.layers.position_config import RoPEConfig

VOCAB_SIZE = 320


def tiny_config(*, tied: bool = True) -> CausalLMConfig:
    """Two layers of a Llama, whose dims split into groups of 16."""
    return llama(
        vocab_size=VOCAB_SIZE,
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        hidden_dim=64,
        tied=tied,
        position=RoPEConfig(theta=1e4),
    )


def random_params(cfg: CausalLMConfig, seed: int = 0) -> Params:
    """Parameters as they start, as NumPy arrays; what starts as ones is moved away from that."""
    params = split(cfg.build(rngs=nnx.Rngs(seed)))[1]
    rng = np.random.default_rng(seed)
    flat = {name: np.asarray(values) for name, values in flatten_params(params).items()}
    moved = {n: v * rng.uniform(0.8, 1.2, v.shape).astype(np.float32) for n, v in flat.items()}
    return unflatten_params(moved)


def save_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of bytes and a few pairs of them."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the statement and the expression of the type " * 9], trainer)
    folder.mkdir(parents=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


def make_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of such a folder."""
    return load_tokenizer(save_tokenizer(folder))


def save_model(folder: Path, *, tied: bool = True, with_tokenizer: bool = True) -> Path:
    """A bundle of the tiny model."""
    cfg = tiny_config(tied=tied)
    tokenizer = save_tokenizer(folder.with_name(f"{folder.name}-tokenizer")) if with_tokenizer else None
    return save_bundle(folder, cfg, random_params(cfg), tokenizer=tokenizer)
