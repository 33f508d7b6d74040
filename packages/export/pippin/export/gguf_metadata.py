"""What a GGUF file says of a model of the Llama family: the way back from `pippin.layers.gguf_architecture`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pippin.core.errors import ConfigError
from pippin.core.hf_files import CONFIG_FILE
from pippin.core.tokenizer import read_tokenizer_object
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.huggingface_config import config_to_huggingface

_DEFAULT_CONTEXT = 2048  # what transformers takes where config.json is silent
_ROPE_FACTORS = "rope_freqs.weight"
_FIXED = {"hidden_act": "silu"}  # of both architectures
_FIXED_QWEN3 = {"attention_bias": False}


def architecture_metadata(cfg: CausalLMConfig, context_length: int) -> dict[str, Any]:
    """The keys of the architecture: key -> str, int (32 bits), or float.

    Raises:
        ConfigError: no architecture of GGUF is the model's; the error says where it differs.
    """
    raw = config_to_huggingface(cfg)
    arch = raw["model_type"]
    for name, only in (_FIXED | (_FIXED_QWEN3 if arch == "qwen3" else {})).items():
        if raw[name] != only:
            raise ConfigError(
                f"the model is a {arch} with {name} {raw[name]!r}; llama.cpp's {arch} has {only!r} and no key for another. "
                f"Export it with //packages/export:huggingface, or train one with {name} {only!r}."
            )
    head_dim = raw["head_dim"]
    return {
        "general.architecture": arch,
        "general.type": "model",
        f"{arch}.block_count": raw["num_hidden_layers"],
        f"{arch}.context_length": context_length,
        f"{arch}.embedding_length": raw["hidden_size"],
        f"{arch}.feed_forward_length": raw["intermediate_size"],
        f"{arch}.attention.head_count": raw["num_attention_heads"],
        f"{arch}.attention.head_count_kv": raw["num_key_value_heads"],
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": float(raw["rope_theta"]),
        f"{arch}.vocab_size": raw["vocab_size"],
    }


def rope_factors(cfg: CausalLMConfig) -> dict[str, np.ndarray]:
    """The tensor of what frequencies are divided by: float32 [H / 2]; none where they are left alone."""
    raw = config_to_huggingface(cfg)
    if (scaling := raw["rope_scaling"]) is None:
        return {}
    frequencies = raw["rope_theta"] ** (-np.arange(0, raw["head_dim"], 2) / raw["head_dim"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return {_ROPE_FACTORS: (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)}


def context_length_of(tokenizer: Path | None) -> int:
    """How long texts may be, as the config.json beside a tokenizer says; a common length where it does not."""
    facts = {} if tokenizer is None else read_tokenizer_object(tokenizer / CONFIG_FILE)
    length = facts.get("max_position_embeddings")
    return length if isinstance(length, int) and 0 < length < 2**31 else _DEFAULT_CONTEXT
