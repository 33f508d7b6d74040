"""Configs of attention."""

import enum
from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError
from pippin.layers.cache_config import FullCacheConfig
from pippin.layers.kernel_config import SelectKernelConfig
from pippin.layers.linear_config import LinearConfig
from pippin.layers.position_config import RoPEConfig


class QKNormOrder(enum.StrEnum):
    """Whether queries and keys are normalised before or after they are rotated."""

    BEFORE_ROTATION = "before_rotation"  # Qwen3
    AFTER_ROTATION = "after_rotation"  # AFM


class GroupedQueryAttentionConfig(
    Config, implementation="pippin.layers.attention:GroupedQueryAttention", provides="attention"
):
    """Causal self-attention whose query heads share fewer key and value heads."""

    input_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED
    num_kv_heads: Required[int] = REQUIRED
    head_dim: Required[int] = REQUIRED
    position: Annotated[Config, Slot("position")] = RoPEConfig()
    qk_norm: Annotated[Config, Slot("norm")] | None = None  # one norm over head_dim for queries, one for keys
    qk_norm_order: QKNormOrder = QKNormOrder.AFTER_ROTATION
    window: int | None = None  # a token sees this many tokens, itself included
    soft_cap: float | None = None
    sinks: bool = False
    q_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    k_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    v_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    o_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    kernel: Annotated[Config, Slot("attention_kernel")] = SelectKernelConfig()
    cache: Annotated[Config, Slot("kv_cache")] = FullCacheConfig()

    def validate(self) -> None:
        _check(self)


class SharedKVAttentionConfig(
    Config, implementation="pippin.layers.attention:SharedKVAttention", provides="attention"
):
    """Attention without keys and values of its own: it reads those of an earlier layer.

    Its position encoding must be that of the layer that it reads.
    """

    input_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED
    num_kv_heads: Required[int] = REQUIRED  # of the layer that it reads
    head_dim: Required[int] = REQUIRED
    position: Annotated[Config, Slot("position")] = RoPEConfig()
    # For queries; the keys were normalised by the layer that made them.
    qk_norm: Annotated[Config, Slot("norm")] | None = None
    qk_norm_order: QKNormOrder = QKNormOrder.AFTER_ROTATION
    window: int | None = None
    soft_cap: float | None = None
    q_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    o_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    kernel: Annotated[Config, Slot("attention_kernel")] = SelectKernelConfig()

    def validate(self) -> None:
        _check(self)


def _check(cfg: GroupedQueryAttentionConfig | SharedKVAttentionConfig) -> None:
    name = type(cfg).__name__.removesuffix("Config")
    heads, kv_heads = cfg.num_heads, cfg.num_kv_heads
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        raise ConfigError(
            f"{name}: num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads}). "
            f"Set num_kv_heads to a divisor of {heads}."
        )
    if cfg.window is not None and cfg.window < 1:
        raise ConfigError(
            f"{name}: window ({cfg.window}) must be at least 1: a token sees itself. "
            "Leave it None for no window."
        )
    if cfg.soft_cap is not None and cfg.soft_cap <= 0:
        raise ConfigError(
            f"{name}: soft_cap ({cfg.soft_cap}) must be positive: logits are divided by it. "
            "Leave it None for no cap."
        )
