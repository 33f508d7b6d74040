"""A trained model in the form in which it is served and compressed: each layer has arrays of its own. No JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.layers.attention_config import SharedKVAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig
from pippin.layers.stack_config import (
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)

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

    Raises:
        ConfigError: a layer reads keys and values of one before a loop, which it would not without the loop.
    """
    _require_same_sources(cfg.decoder)
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


def _require_same_sources(decoder: Config) -> None:
    """Raises ConfigError unless each layer that reads keys and values of another reads the same one's in a sequence of all."""
    layers: list[_Source] = []
    _hand_on(decoder, None, layers)
    last = None
    for i, layer in enumerate(layers):
        if layer.reads and layer.source != last:
            raise ConfigError(
                f"layer {i} reads the keys and values of layer {layer.source}; without loops over layers, in which models are "
                f"served, compressed and exported, it would read those of layer {last}, which a Repeat keeps to itself. Put a "
                "layer of its own, or a SharedKVStack, before it."
            )
        last = i if layer.makes else last


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a layer does with keys and values of layers before it."""

    source: int | None  # whose it is given
    reads: bool
    makes: bool  # some of its own, which it hands on


def _hand_on(cfg: Config, source: int | None, layers: list[_Source]) -> int | None:
    """Adds the layers of a stack, given the keys and values of one before; returns whose it hands on, None for none."""
    match cfg:
        case RepeatConfig():
            for _ in range(cfg.num_layers):
                _hand_on(cfg.layer, source, layers)
            return None
        case SequenceConfig():
            for layer in cfg.layers:
                made = _hand_on(layer, source, layers)
                source = source if made is None else made
            return source
        case SharedKVStackConfig():
            for _ in range(cfg.num_layers - 1):
                _hand_on(cfg.layer, source, layers)
            made = _hand_on(cfg.layer, source, layers)
            for _ in range(cfg.num_readers):
                _hand_on(cfg.reader, made, layers)
            return made
        case TransformerLayerConfig():
            reads = isinstance(cfg.attention, SharedKVAttentionConfig)
            layers.append(_Source(source, reads, not reads))
            return source if reads else len(layers) - 1
        case _:  # parallel tracks keep theirs to themselves
            layers.append(_Source(source, False, False))
            return None


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
