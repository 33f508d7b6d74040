"""Models on disk in any form that is known here: training runs, bundles, Hugging Face folders, and GGUF files."""

import functools
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.core.bundle import CHECKPOINTS_FOLDER, Bundle
from pippin.core.bundle import open_model as open_own
from pippin.core.gguf_file import SUFFIX
from pippin.core.hf_files import CONFIG_FILE
from pippin.core.module import flatten_params
from pippin.core.stored_tensor import StoredTensor
from pippin.layers import configs as _register  # noqa: F401  stored trees name the components by their types
from pippin.layers.gguf import GGUFModel, load_gguf
from pippin.layers.huggingface import HuggingFaceModel, load_huggingface

# What is in a folder that no GGUF file beside it stands for. Some have a config.json too, which says nothing.
_OTHER_FORMS = ("*.safetensors", manifest.FILE_NAME, CHECKPOINTS_FOLDER)


def open_model(path: str | Path) -> Bundle:
    """The model at a path: a run, one of its steps, a bundle, or a Hugging Face folder or GGUF file of the Llama family.

    A folder that holds one GGUF file stands for it. Weights of pippin's own
    forms are read when they are asked for; those of other forms are read now.
    The tokenizer of a GGUF file is written to a folder in the cache.

    Raises:
        ConfigError: the model of a Hugging Face folder or GGUF file has a feature that is not supported.
        CheckpointError: there is no model, or it is damaged.
    """
    path = Path(path).absolute()
    if path.is_file() or _holds(path, f"*{SUFFIX}") and not _holds(path, *_OTHER_FORMS):
        return _as_bundle(path, load_gguf(path))
    if (path / CONFIG_FILE).exists():
        return _as_bundle(path, load_huggingface(path))
    return open_own(path)


def _holds(path: Path, *patterns: str) -> bool:
    return any(any(path.glob(pattern)) for pattern in patterns)


def _as_bundle(path: Path, model: HuggingFaceModel | GGUFModel) -> Bundle:
    weights = {
        name: StoredTensor(values.shape, values.dtype, functools.partial(np.asarray, values))
        for name, values in flatten_params(model.params).items()
    }
    return Bundle(path, model.config, weights, model.tokenizer, manifest.provenance(source=str(path)))
