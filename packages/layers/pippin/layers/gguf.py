"""GGUF models of the Llama family: weights, tokenizer and chat template in one file, as llama.cpp has them.

Weights are dequantised to float32. The rows of a Llama's queries and keys lie
there as rotations of neighbouring dims want them, and come back as they were.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pippin.core.cache_dir import default_cache_dir
from pippin.core.errors import CheckpointError
from pippin.core.gguf_file import SUFFIX, GGUFFile, open_gguf
from pippin.core.gguf_tokenizer import write_tokenizer
from pippin.core.module import Params
from pippin.core.stored_tensor import StoredTensor
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.gguf_architecture import ROTATION, config_from_gguf
from pippin.layers.huggingface import NamedTensor, read_params
from pippin.layers.huggingface_config import config_to_huggingface

_LAYER, _THEIR_LAYER = "decoder.layer.", "blk.{}."

# The path of a parameter, less its last step -> their name of it, less "weight" or "bias".
GGUF_NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    _LAYER + "attention_norm": _THEIR_LAYER + "attn_norm",
    _LAYER + "feed_forward_norm": _THEIR_LAYER + "ffn_norm",
    **{f"{_LAYER}attention.{n}": f"{_THEIR_LAYER}attn_{n}" for n in ("q_norm", "k_norm")},
    **{f"{_LAYER}attention.{n}_proj": f"{_THEIR_LAYER}attn_{n}" for n in "qkv"},
    _LAYER + "attention.o_proj": _THEIR_LAYER + "attn_output",
    **{f"{_LAYER}feed_forward.{n}_proj": f"{_THEIR_LAYER}ffn_{n}" for n in ("gate", "up", "down")},
}

_ROTATED = (".attn_q.weight", ".attn_q.bias", ".attn_k.weight", ".attn_k.bias")


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A model that was loaded."""

    config: CausalLMConfig
    params: Params  # NumPy arrays in float32; layers are stacked
    tokenizer: Path | None  # the folder of its files, in the cache


def load_gguf(path: str | Path, *, cache_dir: Path | None = None) -> GGUFModel:
    """The model in a GGUF file, or in the one that a directory holds.

    Args:
        path: the file or its directory.
        cache_dir: where the tokenizer's files are written; see `default_cache_dir`.

    Raises:
        ConfigError: the model or its tokenizer is of a kind, or has a feature, that is not supported.
        CheckpointError: it is no GGUF file, a tensor is missing or of another shape or type, or its tokenizer is damaged.
        DamageError: what the file says of itself does not fit it.
    """
    file = open_gguf(find_gguf(path))
    cfg = config_from_gguf(file)
    params = read_params(cfg, _tensors(file), GGUF_NAMES, file.path, "metadata")
    return GGUFModel(cfg, params, write_tokenizer(file, cache_dir or default_cache_dir()))


def find_gguf(path: str | Path) -> Path:
    """The file that is meant by a path: itself, or the one GGUF file in a directory.

    Raises:
        CheckpointError: the directory holds none, or several.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:5])
        raise CheckpointError(
            f"{path} holds {len(found)} {SUFFIX} files{f' ({names})' if found else ''}; one is expected. Give the file."
        )
    return found[0]


def in_pairs(cfg: CausalLMConfig, tensors: Mapping[str, NamedTensor]) -> dict[str, NamedTensor]:
    """A Llama's tensors as files have them, whose queries and keys have dims i and i + H/2 of each head side by side."""
    written = {}
    for name, named in tensors.items():
        if name.endswith(_ROTATED):
            tensor = dataclasses.replace(
                named.tensor, read=functools.partial(_paired, named.tensor, _num_heads(cfg, name))
            )
            named = dataclasses.replace(named, tensor=tensor)
        written[name] = named
    return written


def _num_heads(cfg: CausalLMConfig, name: str) -> int:
    raw = config_to_huggingface(cfg)
    return raw["num_attention_heads"] if ".attn_q." in name else raw["num_key_value_heads"]


def _tensors(file: GGUFFile) -> dict[str, StoredTensor]:
    """The tensors as parameters are made of them."""
    tensors = {name: tensor for name, tensor in file.tensors.items() if name != ROTATION}
    if (arch := file.text("general.architecture")) != "llama":
        return tensors
    num_heads = file.integer(f"{arch}.attention.head_count")
    num_kv_heads = file.integer(f"{arch}.attention.head_count_kv", num_heads)
    for name, tensor in tensors.items():
        if name.endswith(_ROTATED):
            heads = num_heads if ".attn_q." in name else num_kv_heads
            tensors[name] = dataclasses.replace(tensor, read=functools.partial(_in_halves, tensor, heads))
    return tensors


def _in_halves(tensor: StoredTensor, num_heads: int) -> np.ndarray:
    """The values with dims i and i + H/2 of each head as pairs, which lie side by side in the file."""
    values = tensor.read()
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _paired(tensor: StoredTensor, num_heads: int) -> np.ndarray:
    """What `_in_halves` is given."""
    values = tensor.read()
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
