"""The model that is exported: without stacks, each weight under a name of its own, compressed or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.errors import ConfigError, DataError
from pippin.core.module import flatten_params, unflatten_params
from pippin.core.quantized_array import QuantizedArray
from pippin.core.registry import component_name
from pippin.core.stored_tensor import signature
from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress.recipes import DEFAULT_RECIPE, NO_RECIPE, recipe
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.model_files import open_model
from pippin.layers.quant.settle import settled
from pippin.v1 import model_pb2


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that was opened."""

    name: str  # as people know it
    cfg: CausalLMConfig  # without stacks
    params: Mapping[str, np.ndarray | QuantizedArray]  # by the path of the parameter in it
    signature: str  # of the weights as they were opened; see model.proto
    recipe: str  # of their compression; "" where they are floats
    tokenizer: Path | None
    provenance: model_pb2.Provenance
    bundle: Bundle

    @property
    def rounded(self) -> bool:
        """It was compressed, or trained with rounded weights."""
        return bool(self.recipe) or any(isinstance(p, QuantizedArray) for p in self.params.values())


def open_source(path: str | Path) -> ModelSource:
    """The model at a path, in any form that `open_model` knows.

    Raises:
        ConfigError: it is no language model.
        CheckpointError: there is no model, or it is damaged.
    """
    bundle = open_model(path)
    cfg = bundle.component
    if not isinstance(cfg, CausalLMConfig):
        raise ConfigError(
            f"{bundle.directory} holds a {component_name(type(cfg))}; only a CausalLM is exported. Give the directory of a "
            "language model."
        )
    read: Mapping[str, Any] = _Read(bundle)
    if bundle.quantized:
        stored = bundle.quantized
        params = {name: stored[name] if name in stored else read[name] for name in bundle.weights}
    else:
        cfg, nested = settled(cfg, bundle.params())
        params = flatten_params(nested)
        if not all(isinstance(values, np.ndarray) for values in params.values()):
            read = _Floats(params)  # what weights were rounded to in training
    given = Path(path).absolute()  # of a run, and not of the step that is opened
    return ModelSource(
        name=given.stem if given.is_file() else given.name,
        cfg=cfg,
        params=params,
        signature=signature(read),
        recipe=bundle.quantization_recipe,
        tokenizer=bundle.tokenizer,
        provenance=bundle.provenance,
        bundle=bundle,
    )


def chosen_recipe(asked: str | None, source: ModelSource) -> str:
    """The recipe that a model is exported by: what was asked for, or else the default one for floats and none for others."""
    if asked is not None:
        return asked
    return NO_RECIPE if source.rounded else DEFAULT_RECIPE


def compressed(
    source: ModelSource, recipe_name: str, progress: Callable[[str, int, int], None] = lambda *_: None
) -> ModelSource:
    """The same model with its weights compressed, as `//packages/export:compress` does by a recipe.

    Args:
        source: a model of floats.
        recipe_name: of the recipe.
        progress: is told what is done, how far it is, and of how much.

    Raises:
        ConfigError: there is no such recipe, or the model is compressed already.
        DataError: the recipe measures the model on text, and the model has no tokenizer.
        QuantizationError: a weight cannot be compressed so.
    """
    # Importing them takes JAX.
    from pippin.export.compress.compress import compress, needs_calibration
    from pippin.export.compress.text import batches, calibration_text

    cfg = recipe(recipe_name)
    if source.rounded:
        how = (
            f"is compressed already, by {source.recipe}"
            if source.recipe
            else "was trained with rounded weights"
        )
        raise ConfigError(
            f"{source.bundle.directory} {how}. Export it without --recipe, or export the model that it was made of."
        )
    text = []
    if needs_calibration(cfg):
        if source.tokenizer is None:
            default = " (the default)" if recipe_name == DEFAULT_RECIPE else ""
            raise DataError(
                f"{source.bundle.directory} has no tokenizer, and the recipe {recipe_name}{default} measures the model on "
                "text. Use a bundle with one, or a recipe that measures nothing: int8, or none to keep the weights as they "
                "are."
            )
        text = batches(cfg.calibration, calibration_text(), load_tokenizer(source.tokenizer))
    result = compress(source.cfg, unflatten_params(source.params), cfg, text, progress)
    params = flatten_params(result.params)
    return dataclasses.replace(
        source, params=params, signature=signature(_Floats(params)), recipe=recipe_name
    )


class _Floats(Mapping[str, Any]):
    """Weights as the floats that they stand for, each made when it is asked for."""

    def __init__(self, params: Mapping[str, np.ndarray | QuantizedArray]):
        self._params = params

    def __getitem__(self, name: str) -> np.ndarray:
        values = self._params[name]
        return values if isinstance(values, np.ndarray) else values.dequantized()

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


class _Read(Mapping[str, Any]):
    """A bundle's weights as floats, each read when it is asked for: all together may be too many."""

    def __init__(self, bundle: Bundle):
        self._bundle = bundle

    def __getitem__(self, name: str) -> np.ndarray:
        return self._bundle.weights[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.weights)

    def __len__(self) -> int:
        return len(self._bundle.weights)
