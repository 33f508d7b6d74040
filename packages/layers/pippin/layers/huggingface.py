"""Hugging Face checkpoints of the Llama family: folders of config.json, safetensors and a tokenizer.

Values are never changed on the way: each tensor keeps its dtype and its bits, so
that what was loaded and is saved again is the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from pippin.core.errors import CheckpointError
from pippin.core.hf_files import CONFIG_FILE, has_tokenizer, open_weights, read_json_object, save_folder
from pippin.core.module import (
    ParameterInfo,
    Params,
    flatten_params,
    parameter_infos,
    unflatten_params,
)
from pippin.core.stored_tensor import StoredTensor
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.huggingface_config import config_from_huggingface, config_to_huggingface

_LAYER, _THEIR_LAYER = "decoder.layer.", "model.layers.{}."

# The path of a parameter, less its last step -> their name of it, less "weight" or "bias".
HUGGINGFACE_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    _LAYER + "attention_norm": _THEIR_LAYER + "input_layernorm",
    _LAYER + "feed_forward_norm": _THEIR_LAYER + "post_attention_layernorm",
    **{f"{_LAYER}attention.{n}": f"{_THEIR_LAYER}self_attn.{n}" for n in ("q_norm", "k_norm")},
    **{f"{_LAYER}attention.{n}_proj": f"{_THEIR_LAYER}self_attn.{n}_proj" for n in "qkvo"},
    **{f"{_LAYER}feed_forward.{n}_proj": f"{_THEIR_LAYER}mlp.{n}_proj" for n in ("gate", "up", "down")},
}

_TIED_HEAD = "lm_head.weight"
_ROTATION = "rotary_emb.inv_freq"  # in some old files; it follows from config.json

# What config.json says of the tokenizer and its use, and goes with the tokenizer.
_OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel:
    """A model that was loaded."""

    config: CausalLMConfig
    params: Params  # NumPy arrays in the dtype of the file; layers are stacked
    tokenizer: Path | None  # the folder of its files


@dataclasses.dataclass(frozen=True)
class NamedTensor:
    """A parameter, or one layer's part of it, as another form has it."""

    path: str  # of the parameter
    layer: int | None  # whose part it is
    tensor: StoredTensor  # of a linear map: [output, input]


def load_huggingface(directory: str | Path) -> HuggingFaceModel:
    """The model in a folder that `save_pretrained` of transformers wrote, or `save_huggingface`.

    Raises:
        ConfigError: config.json is of a model, or has a feature, that is not supported.
        CheckpointError: the folder is no model, or its tensors are not those of its config.json.
        DamageError: files are absent or damaged.
    """
    directory = Path(directory).absolute()
    cfg = config_from_huggingface(read_json_object(directory / CONFIG_FILE))
    tensors = open_weights(directory)
    ignored = {name for name in tensors if name.endswith(_ROTATION)} | (
        {_TIED_HEAD} if cfg.head is None else set()
    )
    described = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    params = read_params(cfg, described, HUGGINGFACE_NAMES, directory, CONFIG_FILE)
    if cfg.head is None and _TIED_HEAD in tensors:
        _require_tied(directory, params["embedding"]["weight"], tensors[_TIED_HEAD].read())
    return HuggingFaceModel(cfg, params, directory if has_tokenizer(directory) else None)


def save_huggingface(
    directory: str | Path,
    cfg: CausalLMConfig,
    params: Mapping[str, Any],
    tokenizer: str | Path | None = None,
    *,
    max_position_embeddings: int | None = None,
    max_file_bytes: int = 5_000_000_000,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder that `from_pretrained` of transformers reads.

    Args:
        directory: where it is to lie; there is nothing there yet.
        cfg: the config tree.
        params: float32, float16 or bfloat16 arrays, JAX's or NumPy's, or what `named_tensors` takes for them.
        tokenizer: a folder whose tokenizer files are copied; if it has a config.json, the ids
            of special tokens and the longest context are taken over from it.
        max_position_embeddings: the longest context, which programs that read the folder allow.
        max_file_bytes: tensors beyond this go to another file.
        finish: adds what else belongs into the folder, which it is given, once all other files are there.

    Raises:
        ConfigError: the tree is no model of the Llama family.
        CheckpointError: the parameters are not those of the tree, or cannot be written.
    """
    raw = config_to_huggingface(cfg)
    flat = flatten_params(params)
    tensors = {name: named.tensor for name, named in named_tensors(cfg, flat, HUGGINGFACE_NAMES).items()}
    raw["torch_dtype"] = str(flat["embedding.weight"].dtype)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    if tokenizer is not None and (tokenizer / CONFIG_FILE).is_file():
        facts = read_json_object(tokenizer / CONFIG_FILE)
        raw |= {name: facts[name] for name in _OF_TOKENIZER if name in facts}
    if max_position_embeddings is not None:
        raw["max_position_embeddings"] = max_position_embeddings
    save_folder(
        Path(directory).absolute(),
        raw,
        tensors,
        tokenizer=tokenizer,
        max_file_bytes=max_file_bytes,
        finish=finish,
    )


def read_params(
    cfg: CausalLMConfig,
    tensors: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    source: Path,
    described_by: str,
) -> Params:
    """The parameters of a model of the Llama family, from its tensors in another form; layers are stacked.

    Args:
        cfg: the config tree.
        tensors: by their names there, each linear map as [output, input].
        names: the path of a parameter, less its last step -> its name there, less "weight" or "bias", with {} for
            the number of a layer.
        source: where the tensors come from, for errors.
        described_by: what the config comes from, for errors.

    Raises:
        CheckpointError: the tensors are not those that the config asks for.
    """
    infos = _infos(cfg)
    if problems := _differences(infos, tensors, names):
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the tensors of {source} are not those that its {described_by} describes: {'; '.join(problems[:5])}{more}. "
            "Take both from one model."
        )
    return unflatten_params({info.path: _read(info, tensors, names) for info in infos})


def named_tensors(
    cfg: CausalLMConfig, flat: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, NamedTensor]:
    """The tensors that another form has of a model's parameters, each made when it is read: what `read_params` takes.

    Those of one parameter follow each other.

    Args:
        cfg: the config tree.
        flat: the parameters by path, layers stacked: arrays, or what gives a shape, a dtype, and an array when it is
            asked for one or, where layers are stacked, for that of a layer.
        names: as for `read_params`.

    Raises:
        CheckpointError: a parameter is missing, unknown, of another shape, or of a dtype that other forms do not have.
    """
    infos = _infos(cfg)
    wanted = {info.path for info in infos}
    for path in sorted(wanted ^ flat.keys()):
        problem = "is missing from the parameters" if path in wanted else "is no parameter of the model"
        raise CheckpointError(f"{path} {problem}. Give the parameters and the config of one model.")
    tensors = {}
    for info in infos:
        value = flat[info.path]
        if tuple(value.shape) != info.shape or str(value.dtype) not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(
                f"{info.path} is {value.dtype}{list(value.shape)}; it must be {list(info.shape)} in float32, float16 "
                "or bfloat16. Give the parameters and the config of one model."
            )
        for i, name in enumerate(_names(info, names)):
            layer = i if info.stacked else None
            read = functools.partial(_layer, value, layer, _is_transposed(info))
            tensor = StoredTensor(_their_shape(info), np.dtype(value.dtype), read)
            tensors[name] = NamedTensor(info.path, layer, tensor)
    return tensors


def _infos(cfg: CausalLMConfig) -> list[ParameterInfo]:
    model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    return list(flatten_params(parameter_infos(model)).values())


def _names(info: ParameterInfo, names: Mapping[str, str]) -> Iterator[str]:
    """Their names of a parameter: one a layer, or one."""
    above, _, last = info.path.rpartition(".")
    name = f"{names[above]}.{'bias' if last == 'bias' else 'weight'}"
    return (name.format(i) for i in range(info.shape[0])) if info.stacked else iter((name,))


def _is_transposed(info: ParameterInfo) -> bool:
    """Whether they store it as [output, input]: the weight of a linear map."""
    return info.provides[-1] == "linear" and len(info.shape) - info.stacked == 2


def _their_shape(info: ParameterInfo) -> tuple[int, ...]:
    shape = info.shape[info.stacked :]
    return shape[::-1] if _is_transposed(info) else shape


def _differences(
    infos: list[ParameterInfo], tensors: Mapping[str, StoredTensor], names: Mapping[str, str]
) -> list[str]:
    """Where the tensors are not those that the config asks for."""
    seen: set[str] = set()
    problems = []
    for info in infos:
        dtype = None
        for name in _names(info, names):
            if name not in tensors:
                problems.append(f"{name} is missing")
                break  # one layer that is missing says enough, and config.json may claim millions
            seen.add(name)
            tensor = tensors[name]
            dtype = dtype or tensor.dtype
            if tensor.shape != _their_shape(info):
                problems.append(f"{name} is {list(tensor.shape)}, not {list(_their_shape(info))}")
            elif tensor.dtype != dtype:
                problems.append(f"{name} is {tensor.dtype}, not {dtype} as in other layers")
    if not problems:  # otherwise names of layers that were not looked at would seem too many
        problems = [f"{name} is not of this model" for name in sorted(tensors.keys() - seen)]
    return problems


def _read(info: ParameterInfo, tensors: Mapping[str, StoredTensor], names: Mapping[str, str]) -> np.ndarray:
    values: np.ndarray | None = None
    for i, name in enumerate(_names(info, names)):
        value = tensors[name].read()
        value = value.T if _is_transposed(info) else value
        if not info.stacked:
            return np.asarray(value, order="C")
        if values is None:
            values = np.empty(info.shape, value.dtype)
        values[i] = value
    assert values is not None
    return values


def _require_tied(directory: Path, embedding: np.ndarray, head: np.ndarray) -> None:
    # Bits, so that a NaN is equal to itself.
    if head.dtype != embedding.dtype or not np.array_equal(head.view(np.uint8), embedding.view(np.uint8)):
        raise CheckpointError(
            f"{directory}: {CONFIG_FILE} says tie_word_embeddings, but {_TIED_HEAD} differs from the embedding. "
            f"Set tie_word_embeddings to false, or remove {_TIED_HEAD}."
        )


def _layer(value: Any, layer: int | None, transposed: bool) -> np.ndarray:
    of_layer = np.asarray(value if layer is None else value[layer])
    return np.ascontiguousarray(of_layer.T if transposed else of_layer)
