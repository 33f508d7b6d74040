"""A trained model in the form in which it is served and compressed: each layer has arrays of its own. No JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pippin.core.config import Config
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig
from pippin.layers.stack_config import RepeatConfig, SequenceConfig, SharedKVStackConfig

Params = dict[str, Any]  # name -> Params or array


@dataclasses.dataclass(frozen=True)
class _Layer:
    cfg: Config
    params: Any  # of a layer: nested dicts of arrays, or what stands for them


def unrolled(cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
    """The same model without loops over layers: its stacks are sequences, and stacked parameters are taken apart.

    A loop copies what it reads of stacked weights and caches, on CPUs most of all, which costs nothing beside the
    products of a batch in training, and as much as all else in decoding. Tracks that run in parallel stay as they are.

    Args:
        cfg: a model's config.
        params: its parameters, NumPy's or JAX's. The results are parts of them.
    """
    decoder = SequenceConfig(layers=())
    layers = _layers(cfg.decoder, params["decoder"])
    decoder = decoder.set(layers=tuple(layer.cfg for layer in layers))
    of_layers = {str(i): layer.params for i, layer in enumerate(layers)}
    return cfg.set(decoder=decoder), {**params, "decoder": {"layers": of_layers}}


def unrolled_config(cfg: CausalLMConfig) -> CausalLMConfig:
    """The config that `unrolled` gives."""
    return unrolled(cfg, {"decoder": _AnyParams()})[0]


def untied(cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
    """The same model with a head of its own, which has a copy of the embedding: [D, V], as matrix products want it."""
    if cfg.head is not None or not isinstance(cfg.embedding, EmbeddingConfig):
        return cfg, dict(params)
    weight = params["embedding"]["weight"].T
    weight = np.ascontiguousarray(weight) if isinstance(weight, np.ndarray) else weight
    return cfg.set(head=LinearConfig()), {**params, "head": {"weight": weight}}


class _AnyParams:
    """Stands for parameters of which none is looked at."""

    def __getitem__(self, _: object) -> "_AnyParams":
        return self


def _layers(cfg: Config, params: Any) -> list[_Layer]:
    """The layers of a stack, in order; of anything else, itself."""
    match cfg:
        case RepeatConfig():
            return _repeated(cfg.layer, cfg.num_layers, params["layer"])
        case SequenceConfig():
            parts = [_layers(layer, params["layers"][str(i)]) for i, layer in enumerate(cfg.layers)]
            return [layer for part in parts for layer in part]
        case SharedKVStackConfig():
            first = _repeated(cfg.layer, cfg.num_layers - 1, params["first"]["layer"])
            source = _layers(cfg.layer, params["source"])
            return [*first, *source, *_repeated(cfg.reader, cfg.num_readers, params["readers"]["layer"])]
        case _:
            return [_Layer(cfg, params)]


def _repeated(cfg: Config, count: int, stacked: Any) -> list[_Layer]:
    return [layer for i in range(count) for layer in _layers(cfg, _at(stacked, i))]


def _at(stacked: Any, index: int) -> Any:
    if isinstance(stacked, Mapping):
        return {name: _at(value, index) for name, value in stacked.items()}
    return stacked[index]
