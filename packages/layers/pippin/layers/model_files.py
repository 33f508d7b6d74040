"""Models on disk in any form that is known here: training runs, bundles, and Hugging Face folders."""

import functools
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.core.bundle import Bundle, StoredTensor
from pippin.core.bundle import open_model as open_own
from pippin.core.module import flatten_params
from pippin.layers import configs as _register  # noqa: F401  stored trees name the components by their types
from pippin.layers.huggingface import load_huggingface

_HUGGING_FACE_CONFIG = "config.json"


def open_model(directory: str | Path) -> Bundle:
    """The model in a directory: a run, one of its steps, a bundle, or a Hugging Face folder of the Llama family.

    Weights of pippin's own forms are read when they are asked for; those of a
    Hugging Face folder are read now.

    Raises:
        ConfigError: the model of a Hugging Face folder has a feature that is not supported.
        CheckpointError: there is no model, or it is damaged.
    """
    directory = Path(directory).absolute()
    if not (directory / _HUGGING_FACE_CONFIG).exists():
        return open_own(directory)
    model = load_huggingface(directory)
    weights = {
        path: StoredTensor(values.shape, values.dtype, functools.partial(np.asarray, values))
        for path, values in flatten_params(model.params).items()
    }
    source = manifest.provenance(source=str(directory))
    return Bundle(directory, model.config, weights, model.tokenizer, source)
