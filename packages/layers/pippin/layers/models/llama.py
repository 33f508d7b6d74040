"""The Llama family: SmolLM2, Llama 2, Llama 3, Llama 3.2 and Qwen3.

One dense decoder: pre-norm, grouped-query attention with RoPE, SwiGLU, no biases.

    model           parameters      differs in
    SmolLM2 135M      134,515,008   tied; RoPE base 100,000
    Llama 2 7B      6,738,415,616   untied; as many key heads as query heads; RoPE base 10,000
    Llama 2 70B    68,976,648,192   untied; eight key heads; RoPE base 10,000
    Llama 3 8B      8,030,261,248   untied; RoPE base 500,000
    Llama 3.2 1B    1,235,814,400   tied; low frequencies slowed 32 times, for long contexts
    Qwen3 0.6B        596,049,920   tied; queries and keys normalised per head before the rotation; base 1,000,000

Source: Llama 2, arXiv:2307.09288, section 2.2; Llama 3, arXiv:2407.21783, section 3.2; SmolLM2, arXiv:2502.02737; Qwen3,
arXiv:2505.09388, section 2; sizes from each model's published config.json.
"""

from pippin.core.config_tree import override
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.linear_config import LinearConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import Llama3ScalingConfig, RoPEConfig
from pippin.layers.stack_config import RepeatConfig, TransformerLayerConfig


def llama(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_dim: int,
    tied: bool,
    position: RoPEConfig,
    norm_eps: float = 1e-5,
) -> CausalLMConfig:
    """The architecture in any sizes. `tied`: logits by the embedding, without a head."""
    norm = RMSNormConfig(eps=norm_eps)
    attention = GroupedQueryAttentionConfig(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, position=position
    )
    layer = TransformerLayerConfig(
        attention=attention, feed_forward=FeedForwardConfig(hidden_dim=hidden_dim), norm=norm
    )
    return CausalLMConfig(
        vocab_size=vocab_size,
        dim=dim,
        decoder=RepeatConfig(layer=layer, num_layers=num_layers),
        norm=norm,
        head=None if tied else LinearConfig(),
    )


def with_qk_norm(cfg: CausalLMConfig) -> CausalLMConfig:
    """A Llama as a Qwen3: queries and keys are normalised per head before they are rotated."""
    attention = "decoder.layer.attention"
    return override(
        cfg,
        {f"{attention}.qk_norm": cfg.norm, f"{attention}.qk_norm_order": QKNormOrder.BEFORE_ROTATION},
    )


def smollm2_135m() -> CausalLMConfig:
    """SmolLM2 135M, for contexts of up to 8,192 tokens."""
    return llama(
        vocab_size=49_152,
        dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        hidden_dim=1536,
        tied=True,
        position=RoPEConfig(theta=100_000.0),
    )


def llama2_7b() -> CausalLMConfig:
    """Llama 2 7B, for contexts of up to 4,096 tokens."""
    return llama(
        vocab_size=32_000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        hidden_dim=11_008,
        tied=False,
        position=RoPEConfig(theta=10_000.0),
    )


def llama2_70b() -> CausalLMConfig:
    """Llama 2 70B, for contexts of up to 4,096 tokens."""
    return llama(
        vocab_size=32_000,
        dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=28_672,
        tied=False,
        position=RoPEConfig(theta=10_000.0),
    )


def llama3_8b() -> CausalLMConfig:
    """Llama 3 8B, for contexts of up to 8,192 tokens."""
    return llama(
        vocab_size=128_256,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=14_336,
        tied=False,
        position=RoPEConfig(theta=500_000.0),
    )


def llama3_2_1b() -> CausalLMConfig:
    """Llama 3.2 1B, for contexts of up to 131,072 tokens."""
    scaling = Llama3ScalingConfig(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    return llama(
        vocab_size=128_256,
        dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        hidden_dim=8192,
        tied=True,
        position=RoPEConfig(theta=500_000.0, scaling=scaling),
    )


def qwen3_0_6b() -> CausalLMConfig:
    """Qwen3 0.6B, for contexts of up to 40,960 tokens."""
    return with_qk_norm(
        llama(
            vocab_size=151_936,
            dim=1024,
            num_layers=28,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            hidden_dim=3072,
            tied=True,
            position=RoPEConfig(theta=1_000_000.0),
            norm_eps=1e-6,
        )
    )
