"""Folders of Hugging Face models: config.json, safetensors with or without an index, tokenizer files. No JAX.

Nothing that a file says is believed before it was compared with what is there,
and pickles are never read.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pippin.core import manifest
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.stored_tensor import StoredTensor

CONFIG_FILE = "config.json"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_MAX_JSON_BYTES = 64 << 20

# What carries a tokenizer and how it is used; config.json is the model's.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}. Give the folder of a Hugging Face model.")
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes; at most {_MAX_JSON_BYTES} are read. It is none of a model's JSON files."
        )
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is no JSON: {e}. Copy it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__}; an object is expected. Copy it again."
        )
    return value


def open_weights(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name. Their headers were read and checked; values are read on demand.

    Raises:
        CheckpointError: there are no safetensors, or tensors of another dtype than float32, float16, bfloat16.
        DamageError: files are absent or damaged, or the index does not say what is in them.
    """
    if (directory / _WEIGHTS).is_file():
        return _open_file(directory, _WEIGHTS)
    if not (directory / _INDEX).is_file():
        raise CheckpointError(f"{directory} has neither {_WEIGHTS} nor {_INDEX}{_instead(directory)}")
    by_file = _read_index(directory)
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for name, listed in by_file.items():
        found = _open_file(directory, name)
        for tensor in sorted(found.keys() ^ listed):
            problems.append(f"{name}: {tensor} is {'not in it' if tensor in listed else 'not in the index'}")
        tensors |= found
    if problems:
        raise DamageError(directory, problems)
    return tensors


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds the file of a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def save_folder(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    *,
    tokenizer: Path | None,
    max_file_bytes: int,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder of a model, whole or not at all.

    Args:
        directory: where it is to lie; there is nothing there yet.
        config: what config.json says.
        tensors: by name; read one file's worth at a time.
        tokenizer: a folder whose tokenizer files are copied.
        max_file_bytes: tensors beyond this go to another file.
        finish: adds what else belongs into the folder, which it is given, once all other files are there.

    Raises:
        CheckpointError: the directory is there already, there is no tokenizer in `tokenizer`,
            or the disk does not take it.
    """
    with manifest.new_directory(directory, "model", safetensors.SafetensorError) as temporary:
        if tokenizer is not None and not has_tokenizer(tokenizer):
            raise CheckpointError(
                f"{tokenizer} holds neither tokenizer.json nor tokenizer.model. Give the folder of a tokenizer, or none."
            )
        manifest.write_file(temporary / CONFIG_FILE, _json(config))
        _write_weights(temporary, tensors, max_file_bytes)
        if tokenizer is not None:
            for name in _TOKENIZER_FILES:
                if (tokenizer / name).is_file():
                    manifest.write_file(temporary / name, (tokenizer / name).read_bytes())
        if finish is not None:
            finish(temporary)


def _instead(directory: Path) -> str:
    """What to do about a folder without safetensors."""
    names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    pickle = next((name for name in names if name.endswith(_PICKLES)), None)
    if pickle:
        return (
            f", but {pickle}, a pickle. Pickles can run code and are never read: save the model as safetensors, "
            "for example with save_pretrained of transformers."
        )
    return f"; it holds {', '.join(names[:10]) or 'nothing'}. Give the folder of a Hugging Face model."


def _read_index(directory: Path) -> dict[str, set[str]]:
    """The names of the tensors in each file, as the index lists them."""
    weight_map = read_json_object(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamageError(directory, [f"{_INDEX}: has no weight_map, from each tensor to its file"])
    by_file: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
        if not plain:
            raise DamageError(
                directory, [f"{_INDEX}: {tensor} is in {file!r}, which is no .safetensors file beside it"]
            )
        by_file.setdefault(file, set()).add(tensor)
    return by_file


def _open_file(directory: Path, name: str) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        # Refuses a header that is longer than the file, and tensors that do not fill the rest of it.
        with safetensors.safe_open(directory / name, framework="np") as file:
            for tensor in file.keys():  # noqa: SIM118  it is no dict
                header = file.get_slice(tensor)
                dtype = header.get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{directory / name}: {tensor} is {dtype}; only {', '.join(_DTYPES)} are weights that are not "
                        "quantised. Take the model in one of these."
                    )
                tensors[tensor] = StoredTensor(
                    shape=tuple(header.get_shape()),
                    dtype=np.dtype(_DTYPES[dtype]),
                    read=functools.partial(_read, directory, name, tensor),
                )
    except (safetensors.SafetensorError, OSError) as e:
        raise DamageError(directory, [f"{name}: {e}"]) from None
    return tensors


def _read(directory: Path, name: str, tensor: str) -> np.ndarray:
    try:
        with safetensors.safe_open(directory / name, framework="np") as file:
            return file.get_tensor(tensor)
    except (safetensors.SafetensorError, OSError) as e:
        raise DamageError(directory, [f"{name}: {tensor}: {e}"]) from None


def _write_weights(folder: Path, tensors: Mapping[str, StoredTensor], max_file_bytes: int) -> None:
    groups: list[list[str]] = [[]]
    sizes = [0]
    for name, tensor in tensors.items():
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if groups[-1] and sizes[-1] + nbytes > max_file_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(name)
        sizes[-1] += nbytes
    weight_map = {}
    for i, group in enumerate(groups, 1):
        file = _WEIGHTS if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        # Row-major, since safetensors writes the memory of an array as it lies there.
        values = {name: np.asarray(tensors[name].read(), order="C") for name in group}
        # transformers refuses a file that does not name its format.
        safetensors.numpy.save_file(values, folder / file, metadata={"format": "pt"})
        manifest.sync(folder / file)
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        manifest.write_file(folder / _INDEX, _json(index))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
