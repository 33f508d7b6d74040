"""The model that is exported: without stacks, each weight under a name of its own, compressed or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.errors import ConfigError
from pippin.core.module import flatten_params
from pippin.core.quantized_array import QuantizedArray
from pippin.core.registry import component_name
from pippin.core.stored_tensor import signature
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.model_files import open_model
from pippin.layers.unrolled import unrolled
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
    read = _Read(bundle)
    if bundle.quantized:
        compressed = frozenset(bundle.quantized)  # asking the mapping itself would read each
        params = {
            name: bundle.quantized[name] if name in compressed else read[name] for name in bundle.weights
        }
    else:
        cfg, nested = unrolled(cfg, bundle.params())
        params = flatten_params(nested)
    directory = bundle.directory
    return ModelSource(
        name=directory.stem if directory.is_file() else directory.name,
        cfg=cfg,
        params=params,
        signature=signature(read),
        recipe=bundle.quantization_recipe,
        tokenizer=bundle.tokenizer,
        provenance=bundle.provenance,
        bundle=bundle,
    )


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
