"""The stacks of the model that an adapter was trained on, as the adapter's own maps tell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pippin.core.adapter import LowRank
from pippin.core.config import Config
from pippin.core.module import flatten_params, unflatten_params
from pippin.layers.adapter import unrolled_maps
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.stack_config import (
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)
from pippin.layers.unrolled import unrolled_config

_DECODER = "decoder."


def maps_by_layer(maps: Mapping[str, LowRank], num_layers: int) -> dict[str, LowRank] | None:
    """An adapter's maps as maps for the same model without stacks: `unrolled_maps` without the model.

    The maps lie in the model's stacks, and have their lengths. That is enough where each part of the model has a map.

    Args:
        maps: by the path of the linear map that they are for.
        num_layers: of the model.

    Returns:
        The maps, or None where a part of the model has none, so that nobody can tell how many layers it has.
    """
    if not all(path.startswith(_DECODER) for path in maps):
        return None
    stack = _stack(unflatten_params({path.removeprefix(_DECODER): pair for path, pair in maps.items()}), 0)
    cfg = None if stack is None else CausalLMConfig().set(decoder=stack)
    if cfg is None or len(unrolled_config(cfg).decoder.layers) != num_layers:  # type: ignore[attr-defined]
        return None
    return unrolled_maps(cfg, unflatten_params({f"{path}.weight": None for path in maps}), maps)


def _stack(maps: Any, depth: int) -> Config | None:
    """The stack whose layers have these maps, without what its layers are; None where a part of it has none.

    Args:
        maps: nested, as parameters are.
        depth: how many dims of the maps count layers of the stacks that this one is in.
    """
    match sorted(maps) if isinstance(maps, dict) else []:
        case []:
            return None
        case ["layer"]:
            layer, length = _stack(maps["layer"], depth + 1), _length(maps, depth)
            return None if layer is None or length is None else RepeatConfig(layer=layer, num_layers=length)
        case ["layers"] if isinstance(maps["layers"], dict):
            parts = [_stack(maps["layers"].get(str(i)), depth) for i in range(len(maps["layers"]))]
            layers = tuple(part for part in parts if part is not None)
            return SequenceConfig(layers=layers) if len(layers) == len(parts) else None
        case ["first", "readers", "source"]:
            first, readers = (_stack(maps[name], depth) for name in ("first", "readers"))
            if isinstance(first, RepeatConfig) and isinstance(readers, RepeatConfig):
                return SharedKVStackConfig(num_layers=first.num_layers + 1, num_readers=readers.num_layers)
            return None
        case _:
            return TransformerLayerConfig()


def _length(maps: Any, dim: int) -> int | None:
    """Of a dim of the maps, where it is the same in all of them."""
    lengths = {pair.down.shape[dim : dim + 1] for pair in flatten_params(maps).values()}
    length = lengths.pop() if len(lengths) == 1 else ()
    return length[0] if length else None
