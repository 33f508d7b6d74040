"""What weights cost, by kind of layer and by layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from pippin.v1 import export_pb2 as pb

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_MATRIX = re.compile(r"(?:.*\.)?(\w+)\.weight")
_LOW_RANK = re.compile(r".*\.(?:down|up)")  # of a linear map with LoRA
_ADDED = "LoRA"
_OTHERS = "norms and biases"
_AROUND = "ends"  # what is in no layer


@dataclasses.dataclass
class Cost:
    """Of some weights together."""

    count: int = 0
    num_bytes: int = 0
    schemes: set[str] = dataclasses.field(default_factory=set)  # such as "palettized 4"

    @property
    def bits_per_weight(self) -> float:
        """Tables and scales counted."""
        return 8 * self.num_bytes / self.count


def by_kind(weights: Iterable[pb.ExportedWeight]) -> dict[str, Cost]:
    """What matrices of one name cost, such as q_proj, those that cost most first; all vectors together are last."""
    costs: dict[str, Cost] = {}
    for weight in weights:
        _add(costs.setdefault(_kind(weight.name), Cost()), weight)
    return dict(sorted(costs.items(), key=lambda item: (item[0] == _OTHERS, -item[1].num_bytes, item[0])))


def by_layer(weights: Iterable[pb.ExportedWeight]) -> dict[str, dict[str, Cost]]:
    """The same of each layer, and of what is in none."""
    layers: dict[str, list[pb.ExportedWeight]] = {}
    for weight in weights:
        match = _LAYER.match(weight.name)
        layers.setdefault(match[1] if match else _AROUND, []).append(weight)
    order = sorted(layers, key=lambda layer: (layer == _AROUND, layer.zfill(6)))
    return {layer: by_kind(layers[layer]) for layer in order}


def _kind(name: str) -> str:
    if _LOW_RANK.fullmatch(name):
        return _ADDED
    match = _MATRIX.fullmatch(name.replace(".base.", "."))
    return match[1] if match else _OTHERS


def _add(cost: Cost, weight: pb.ExportedWeight) -> None:
    cost.count += weight.count
    cost.num_bytes += weight.bytes
    is_float = weight.scheme.startswith(("float", "bfloat"))
    cost.schemes.add(weight.scheme if is_float else f"{weight.scheme} {weight.bits}")
