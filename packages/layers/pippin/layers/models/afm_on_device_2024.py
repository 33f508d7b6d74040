"""AFM on-device, 2024: a dense decoder of 2,737,739,264 parameters (2.587B beside the embedding's 0.151B).

Pre-norm, grouped-query attention whose queries and keys are normalised per head
after the rotation, SwiGLU, no biases, embedding tied to the output.

Published: every size but the feed-forward's hidden dim. That one, the norms'
epsilon, the order of rotation and norm, and the z-loss are of `honeycrisp`, the
3B recipe of AXLearn, which agrees with all that is published; Apple does not say
that the two are one model.

Source: Gunter et al. 2024, arXiv:2407.21075, section 2; AXLearn, `honeycrisp`.
"""

from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import RoPEConfig
from pippin.layers.stack_config import RepeatConfig, TransformerLayerConfig


def afm_on_device_2024(
    *,
    vocab_size: int = 49_152,
    dim: int = 3072,
    num_layers: int = 26,
    num_heads: int = 24,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    hidden_dim: int = 8064,
) -> CausalLMConfig:
    """The model of the paper, or the same architecture in other sizes.

    The stage that lengthens the context to 32,768 tokens sets
    `decoder.layer.attention.position.theta` to 6,315,089.
    """
    norm = RMSNormConfig(eps=1e-5)
    attention = GroupedQueryAttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        position=RoPEConfig(theta=500_000.0),
        qk_norm=norm,
        qk_norm_order=QKNormOrder.AFTER_ROTATION,
    )
    layer = TransformerLayerConfig(
        attention=attention, feed_forward=FeedForwardConfig(hidden_dim=hidden_dim), norm=norm
    )
    return CausalLMConfig(
        vocab_size=vocab_size,
        dim=dim,
        decoder=RepeatConfig(layer=layer, num_layers=num_layers),
        norm=norm,
        z_loss=1e-6,
    )
