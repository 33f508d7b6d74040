"""AFM server, 2025: parallel tracks with mixtures of experts (PT-MoE), 147.8B parameters, 15.8B active.

Each track is a narrow decoder of its own. Tracks see the same input, and their
results are averaged after every block of D = 4 layers: so devices that hold
different tracks talk L/D times instead of 2L. A block is one round of

    layer       1           2           3           4
    attention   local       local       local       global
    FFN         dense       experts     dense       experts

where local is RoPE in a window of 4096 tokens, and global sees everything and has
no position encoding. Experts belong to their track; no token is dropped.

Published of the model itself: this design. Its size, tracks and experts: unknown.
The defaults are those of the library that Apple published (not claimed to be
production): 8 tracks of 48 layers, dim 2048, attention of 4 heads of 128, FFN
5888, and 40 experts of 2944 of which a router capped at 50 chooses 2. Our choice,
as nothing says otherwise: as many key and value heads as query heads (fewer would
miss 147.8B), the tied embedding, norms and vocabulary of the on-device model of
2025, and a router's weights that add up to one over the chosen experts.

Source: arXiv:2507.13575, section 2.2; arXiv:2602.07306 (parallel tracks).
"""

from pippin.core.errors import ConfigError
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder
from pippin.layers.cache_config import SlidingWindowCacheConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.moe_config import MoEConfig, TopKRouterConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import NoPEConfig, RoPEConfig
from pippin.layers.stack_config import (
    ParallelTracksConfig,
    RepeatConfig,
    SequenceConfig,
    TransformerLayerConfig,
)

_BLOCK = 4  # layers between two meetings of the tracks, D


def afm_server_2025(
    *,
    vocab_size: int = 153_600,
    dim: int = 2048,
    num_tracks: int = 8,
    num_layers: int = 48,
    num_heads: int = 4,
    head_dim: int = 128,
    window: int = 4096,
    hidden_dim: int = 5888,
    num_experts: int = 40,
    top_k: int = 2,
    expert_hidden_dim: int = 2944,
) -> CausalLMConfig:
    """The published design, by default in the sizes of the published library.

    `num_layers`, `num_heads`, `num_experts` and the hidden dims are those of one track.

    Raises:
        ConfigError: `num_layers` is no multiple of the 4 layers of a block.
    """
    if num_layers % _BLOCK:
        raise ConfigError(
            f"afm_server_2025: num_layers ({num_layers}) must be a multiple of {_BLOCK}, the layers of a block: "
            f"three with local attention and one with global. Use {num_layers // _BLOCK * _BLOCK + _BLOCK}."
        )
    norm = RMSNormConfig(eps=1e-5)
    everywhere = GroupedQueryAttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        position=NoPEConfig(),
        qk_norm=norm,
        qk_norm_order=QKNormOrder.AFTER_ROTATION,
    )
    local = everywhere.set(
        position=RoPEConfig(theta=500_000.0), window=window, cache=SlidingWindowCacheConfig()
    )
    dense = FeedForwardConfig(hidden_dim=hidden_dim)
    experts = MoEConfig(
        hidden_dim=expert_hidden_dim,
        num_experts=num_experts,
        top_k=top_k,
        router=TopKRouterConfig(soft_cap=50.0),
    )
    block = tuple(
        TransformerLayerConfig(attention=attention, feed_forward=feed_forward, norm=norm)
        for attention, feed_forward in (
            (local, dense),
            (local, experts),
            (local, dense),
            (everywhere, experts),
        )
    )
    tracks = ParallelTracksConfig(layer=SequenceConfig(layers=block), num_tracks=num_tracks)
    return CausalLMConfig(
        vocab_size=vocab_size,
        dim=dim,
        decoder=RepeatConfig(layer=tracks, num_layers=num_layers // _BLOCK),
        norm=norm,
        z_loss=1e-6,
    )
