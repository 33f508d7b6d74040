"""The functions, states and fixed sizes of a program, whichever runtime it is for."""

from __future__ import annotations

import dataclasses

from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError
from pippin.layers.attention_config import GroupedQueryAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig

FUNCTIONS = ("prefill", "decode")
STATES = ("keyCache", "valueCache")

_CONTEXT_STEP = 32  # the neural engine wants dims of states in multiples of it


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The fixed sizes of a program.

    Raises:
        ConfigError: they do not fit each other.
    """

    context_length: int = 512  # slots of the caches
    prefill_length: int = 64  # tokens that a call of `prefill` reads
    adapter_rank: int = 0  # of the largest adapter that fits; 0: the program takes none

    def __post_init__(self) -> None:
        if self.context_length < _CONTEXT_STEP or self.context_length % _CONTEXT_STEP:
            raise ConfigError(
                f"the context is {self.context_length} tokens; it must be a multiple of {_CONTEXT_STEP}, since the neural "
                f"engine takes no other states. Use {-(-max(self.context_length, 1) // _CONTEXT_STEP) * _CONTEXT_STEP}."
            )
        if not 1 < self.prefill_length <= self.context_length:
            raise ConfigError(
                f"prefill reads {self.prefill_length} tokens at a time; it must be from 2 to the {self.context_length} of "
                f"the context. Set prefill to {min(64, self.context_length)}, or make the context larger."
            )
        if self.adapter_rank < 0:
            raise ConfigError(f"the adapter rank is {self.adapter_rank}; it must be 0, for none, or more.")


def prompt_length(prefill: int, context: int, steps: int) -> int:
    """How long a prompt to verify with is: one part and half of the next, so that padding is seen; less in small caches.

    Args:
        prefill: tokens of a prompt that are read at a time.
        context: tokens that the caches hold, the padding of a last part too.
        steps: that are decoded behind it, two less than the context at most.
    """
    wanted = prefill + prefill // 2
    if 2 * prefill > context or wanted + steps > context:
        wanted = min(prefill, context - steps)
    return max(wanted, 2)


def cache_shape(cfg: CausalLMConfig, context: int) -> tuple[int, ...]:
    """Of a state: float16 [layers with a cache, 1, K, S, H]."""
    caching = {path: child for path, child in traverse(cfg) if isinstance(child, GroupedQueryAttentionConfig)}
    shapes = {(child.num_kv_heads, child.head_dim) for child in caching.values()}
    if len(shapes) != 1:
        what = " and ".join(f"{heads} heads of {dim}" for heads, dim in sorted(shapes)) or "none"
        raise ConfigError(
            f"the layers keep keys and values of {what}; a package has one cache for all, so that they must be alike. Give "
            "all layers the same num_kv_heads and head_dim."
        )
    heads, head_dim = shapes.pop()
    return len(caching), 1, heads, context, head_dim
