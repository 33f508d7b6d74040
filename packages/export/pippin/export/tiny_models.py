"""Small models of the Llama family with small real tokenizers, for tests."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from pippin.core.bundle import save_bundle
from pippin.core.config_tree import override
from pippin.core.module import Params, flatten_params, parameter_infos, unflatten_params
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.llama import llama, with_qk_norm
from pippin.layers.position_config import Llama3ScalingConfig, RoPEConfig

VOCAB_SIZE = 416

_TEXT = "def main():\n    return 12345  # it's the tail, isn't it? Ünïcödé 日本語\r\n\n\n"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "hidden_dim": 96,
}
_BIASES = {
    **{f"decoder.layer.attention.{p}_proj.bias": True for p in "qkvo"},
    **{f"decoder.layer.feed_forward.{p}_proj.bias": True for p in ("gate", "up", "down")},
}
# A factor from so few tokens on that it changes what short texts give.
_SCALING = Llama3ScalingConfig(factor=8.0, original_context=8192)

CONFIGS: dict[str, CausalLMConfig] = {
    "tied": llama(**_SIZES, tied=True, position=RoPEConfig(theta=100_000.0)),
    "untied": llama(**_SIZES, tied=False, position=RoPEConfig(theta=10_000.0), norm_eps=1e-6),
    "scaled": llama(**_SIZES, tied=True, position=RoPEConfig(theta=500_000.0, scaling=_SCALING)),
    "biases": override(llama(**_SIZES, tied=False, position=RoPEConfig()), _BIASES),
    "normed": with_qk_norm(llama(**_SIZES, tied=True, position=RoPEConfig(), norm_eps=1e-6)),
}


@functools.cache
def random_params(name: str) -> Params:
    """Parameters of a model of `CONFIGS`: float32, sharp attention, and no norm or bias that is as it starts."""
    model = nnx.eval_shape(lambda: CONFIGS[name].build(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(len(name))
    params = {}
    for path, info in flatten_params(parameter_infos(model)).items():
        if path.endswith("scale"):
            values = rng.uniform(0.5, 1.5, info.shape)
        else:
            of_linear = info.provides[-1] == "linear" and len(info.shape) - info.stacked == 2
            values = rng.normal(size=info.shape) * (1.2 * info.shape[-2] ** -0.5 if of_linear else 0.5)
        params[path] = values.astype(np.float32)
    return unflatten_params(params)


def save_tiny(directory: Path, name: str = "tied", tokenizer: Path | None = None) -> Path:
    """A bundle of a model of `CONFIGS`, with the byte-level tokenizer unless another is given."""
    tokenizer = tokenizer or save_byte_level(directory.with_name(f"{directory.name}.tokenizer"))
    return save_bundle(directory, CONFIGS[name], random_params(name), tokenizer=tokenizer)


def save_byte_level(directory: Path, **config: object) -> Path:
    """A folder with a byte-level BPE that splits as SmolLM2 does, and more entries of tokenizer_config.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT] * 40, trainer)
    tokenizer.add_tokens(["<think>"])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    facts = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(facts | {"add_bos_token": False, "chat_template": TEMPLATE} | config)
    )
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    return directory


def save_sentencepiece(directory: Path, **changes: Any) -> Path:
    """A folder with a SentencePiece BPE with byte fallback, as training here makes it, or with other settings."""
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "character_coverage": 0.98,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": 3,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines() * 40), model_writer=model, **(settings | changes)
    )
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory
