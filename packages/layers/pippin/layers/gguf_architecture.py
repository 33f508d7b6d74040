"""The metadata of GGUF models of the Llama family as config trees. No JAX.

A key that changes what the model computes and cannot be expressed is refused by name.
"""

from typing import Any

import numpy as np

from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.gguf_file import GGUFFile
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.huggingface_config import config_from_huggingface

ARCHITECTURES = ("llama", "qwen3")

EMBEDDING, HEAD, ROTATION = "token_embd.weight", "output.weight", "rope_freqs.weight"
QUERIES = "blk.0.attn_q.weight"

# Keys below the architecture's name. Some say nothing of what is computed, and others only have one value here.
_READ = {
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.original_context_length",
}
_OF_USE_ONLY = {"context_length", "vocab_size", "rope.scaling.finetuned"}
_FIXED: dict[str, Any] = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "tensor_data_layout": "",
    "use_parallel_residual": False,
}

# Llama 3.1 and later; their files have the factors of the frequencies, but not what they were made of.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def config_from_gguf(file: GGUFFile) -> CausalLMConfig:
    """The tree of a file of architecture `llama` or `qwen3`.

    Raises:
        ConfigError: another architecture, a feature that is not supported, or a size that is out of range.
        CheckpointError: a key is absent or of another kind than it should be.
    """
    arch = file.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: general.architecture is {arch[:80]!r}, which is not supported: it must be one of "
            f"{', '.join(ARCHITECTURES)}. Choose another model."
        )
    _refuse_unsupported(file, arch)
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor {EMBEDDING} is missing. Get the file again.")

    def integer(name: str, default: int | None = None) -> int:
        return file.integer(f"{arch}.{name}", default)

    dim, num_heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", dim // max(num_heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if integer(name, head_dim) != head_dim:
            raise _unsupported(file, f"{arch}.{name}", f"the same as the dim of a head's keys, {head_dim}")
    raw: dict[str, Any] = {
        "model_type": arch,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "hidden_size": dim,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{arch}.rope.freq_base", 10_000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": HEAD not in file.tensors,
    }
    if ROTATION in file.tensors:
        context = integer("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
        raw["rope_scaling"] = _scaling(file, head_dim, raw["rope_theta"], context)
    try:
        cfg = config_from_huggingface(raw)
    except ConfigError as e:
        raise ConfigError(f"{file.path}, whose metadata were read as a config.json: {e}") from None
    _require_heads(file, num_heads, head_dim)
    return cfg


def _refuse_unsupported(file: GGUFFile, arch: str) -> None:
    for key in sorted(file.metadata):
        above, _, name = key.partition(".")
        if above != arch or name in _READ | _OF_USE_ONLY:
            continue
        if name not in _FIXED:
            raise ConfigError(
                f"{file.path}: {key} is of a feature that is not supported. Choose another model of the Llama family."
            )
        value = file.metadata[key]
        if isinstance(value, (list, np.ndarray)) or value != _FIXED[name]:
            raise _unsupported(file, key, repr(_FIXED[name]))


def _require_heads(file: GGUFFile, num_heads: int, head_dim: int) -> None:
    """Raises unless the heads are as large as they are said to be: the model makes a table of rotations for each dim."""
    queries = file.tensors.get(QUERIES)
    if queries is None or queries.shape[0] != num_heads * head_dim:
        got = "is missing" if queries is None else f"is {list(queries.shape)}"
        raise CheckpointError(
            f"{file.path}: tensor {QUERIES} {got}; it must have {num_heads} heads of {head_dim} rows. Get the file again."
        )


def _scaling(file: GGUFFile, head_dim: int, theta: float, context: int) -> dict[str, Any]:
    """The scaling of Llama 3 that gives the file's factors, by which frequencies are divided."""
    given = file.tensors[ROTATION].read().ravel()
    factor = float(given.max())
    if 2 * given.size != head_dim or not np.allclose(
        given, _factors(theta, factor, context, given.size), rtol=1e-4
    ):
        raise ConfigError(
            f"{file.path}: {ROTATION} has factors that are not those of Llama 3's scaling by {factor:g} from "
            f"{context} tokens on, which alone is supported. Choose another model."
        )
    return _LLAMA3 | {"factor": factor, "original_max_position_embeddings": context}


def _factors(theta: float, factor: float, context: int, num_pairs: int) -> np.ndarray:
    """What Llama 3's scaling divides the frequencies by; not finite for numbers that make no sense."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    with np.errstate(all="ignore"):
        turns = context / (2 * np.pi) * theta ** (-np.arange(num_pairs) / num_pairs)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return 1 / ((1 - smooth) / (factor if factor > 0 else np.nan) + smooth)


def _unsupported(file: GGUFFile, key: str, rule: str) -> ConfigError:
    value = repr(file.metadata[key])
    return ConfigError(
        f"{file.path}: {key} is {value[:80]}, which is not supported: it must be {rule}. Choose another model."
    )
