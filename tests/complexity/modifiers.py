"""All that a user writes to integrate a feature into any model: the modifiers that the report counts."""

from pippin.core.config_tree import inherit, replace
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.moe_config import MoEConfig
from pippin.layers.position_config import NoPEConfig, RoPEConfig
from tests.complexity.user_features import LogDistance, SharedExpertMoE


def with_rope(cfg: CausalLMConfig) -> CausalLMConfig:
    """Every layer rotates its queries and keys."""
    return replace(cfg, NoPEConfig, RoPEConfig(theta=10_000.0))


def with_moe(cfg: CausalLMConfig) -> CausalLMConfig:
    """Every feed-forward is a mixture of experts of the same hidden dim."""
    return replace(cfg, FeedForwardConfig, MoEConfig(num_experts=4, top_k=2))


def with_log_distance(cfg: CausalLMConfig) -> CausalLMConfig:
    """Every layer prefers keys that are near."""
    return replace(cfg, NoPEConfig, LogDistance.Config())


def with_shared_expert(cfg: CausalLMConfig) -> CausalLMConfig:
    """Every feed-forward keeps what it was as the shared expert, beside four routed ones of its sizes."""
    moe = MoEConfig(num_experts=4, top_k=1)
    return replace(
        cfg, FeedForwardConfig, lambda old: SharedExpertMoE.Config(shared=old, routed=inherit(moe, old))
    )
