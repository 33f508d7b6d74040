"""What a step of a model reads and computes, operation by operation. No JAX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pippin.core.config import Config
from pippin.core.config_tree import traverse
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.export.latency.chips import BANDWIDTH_SHARE, COMPUTE_SHARE, Chip
from pippin.layers.attention_config import GroupedQueryAttentionConfig, SharedKVAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.moe_config import MoEConfig

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_FLOAT16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Operation:
    """Of one step."""

    name: str
    layer: str  # its number, or "ends"
    kind: str  # such as "q_proj", "attention", "head"
    bits: float  # of a weight, tables counted; 0 where it has none
    nbytes: float  # read and written
    flops: float

    def seconds(self, chip: Chip) -> float:
        """An estimate: whichever takes longer, the memory or the arithmetic."""
        memory = self.nbytes / (chip.gigabytes_per_s * 1e9 * BANDWIDTH_SHARE)
        return max(memory, self.flops / (chip.float16_tops * 1e12 * COMPUTE_SHARE))


def operations(
    cfg: CausalLMConfig, weights: Mapping[str, np.ndarray | QuantizedArray], tokens: int, context: int
) -> list[Operation]:
    """What a step of so many tokens takes, with all logits, over a cache for `context` tokens that is read and written whole.

    Args:
        cfg: of the model without stacks.
        weights: by the path of the parameter. Floats count as float16, as packages store them.
        tokens: of the step; 1 is decoding.
        context: tokens that the cache holds.
    """
    found = []
    for name, weight in weights.items():
        found += _of_weight(cfg, name, weight, tokens)
    found += [
        o for i, layer in enumerate(cfg.decoder.layers) for o in _attentions(str(i), layer, tokens, context)
    ]
    order = {o.layer: (o.layer == "ends", o.layer.zfill(6)) for o in found}
    return sorted(found, key=lambda o: order[o.layer])


def _of_weight(cfg: CausalLMConfig, name: str, weight: Any, tokens: int) -> list[Operation]:
    match = _LAYER.match(name)
    layer = match[1] if match else "ends"
    compressed = isinstance(weight, Palettized | Scaled)
    count = int(np.prod(weight.shape))
    nbytes = weight.nbytes if compressed else _FLOAT16_BYTES * count
    bits = 8 * nbytes / count
    if name == "embedding.weight":
        rows = weight.shape[0]
        found = [Operation(f"{name} (look-up)", layer, "embedding", bits, nbytes * tokens / rows, 0)]
        if cfg.head is None:
            found.append(Operation(f"{name} (logits)", layer, "head", bits, nbytes, 2 * count * tokens))
        return found
    owner = name.removesuffix(".weight").removesuffix(".base").rpartition(".")[2]
    if len(weight.shape) < 2:
        return [Operation(name, layer, "norm", bits, nbytes, 4 * count * tokens)]
    used, worked = _experts(cfg, layer, weight, tokens)
    return [Operation(name, layer, owner, bits, nbytes * used, 2 * count * tokens * worked)]


def _experts(cfg: CausalLMConfig, layer: str, weight: Any, tokens: int) -> tuple[float, float]:
    """Which shares of a weight are read, and multiplied for each token: below 1 for the experts of a mixture."""
    if len(weight.shape) != 3 or layer == "ends":
        return 1.0, 1.0
    for _, part in traverse(cfg.decoder.layers[int(layer)]):
        if isinstance(part, MoEConfig):
            share = part.top_k / part.num_experts
            return 1 - (1 - share) ** tokens, share
    return 1.0, 1.0


def _attentions(layer: str, cfg: Config, tokens: int, context: int) -> list[Operation]:
    found = []
    for path, part in traverse(cfg):
        if not isinstance(part, GroupedQueryAttentionConfig | SharedKVAttentionConfig):
            continue
        cache = 2 * _FLOAT16_BYTES * part.num_kv_heads * part.head_dim * context
        if isinstance(part, GroupedQueryAttentionConfig):
            cache *= 2  # written as well
        flops = 4 * part.num_heads * part.head_dim * context * tokens
        found.append(Operation(f"decoder.layers.{layer}.{path} (cache)", layer, "attention", 0, cache, flops))
    return found
