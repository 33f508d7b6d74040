"""AFM on-device, 2025: a dense decoder of 3,111,368,064 parameters in two blocks.

Block 1 has 35 layers. The 21 layers of block 2 have queries of their own and
read the keys and values of block 1's last layer: 37.5% less cache, and prefill
does not compute block 2.

The sizes are the defaults of the code that Apple published with the model. They
come to exactly the number of frozen parameters that it ships:

    embedding (tied)                  153,600 x 2048        314,572,800
    block 1, projections        35 x (2 x 2048^2 + 2 x 2048 x 256)
    block 2, projections        21 x  2 x 2048^2
    feed-forwards               56 x  3 x 2048 x 6656
    norms before them           56 x  2 x 2048, and 2048 after the last layer
    norms of heads              35 x  2 x 128 + 21 x 128    queries and keys; block 2: queries alone

so that block 2 has no norm for keys, and no layer a norm behind its branches.
Not published: the norms' epsilon and the z-loss, here those of the model of 2024.

Source: arXiv:2507.13575, section 2.1 (the two blocks).
"""

from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder, SharedKVAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import RoPEConfig
from pippin.layers.stack_config import SharedKVStackConfig, TransformerLayerConfig


def afm_on_device_2025(
    *,
    vocab_size: int = 153_600,
    dim: int = 2048,
    num_layers: int = 35,
    num_readers: int = 21,
    num_heads: int = 16,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    hidden_dim: int = 6656,
) -> CausalLMConfig:
    """The published model, or the same architecture in other sizes.

    `num_layers` are those of block 1, `num_readers` those of block 2.
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
    reading = SharedKVAttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        position=RoPEConfig(theta=500_000.0),
        qk_norm=norm,
        qk_norm_order=QKNormOrder.AFTER_ROTATION,
    )
    feed_forward = FeedForwardConfig(hidden_dim=hidden_dim)
    return CausalLMConfig(
        vocab_size=vocab_size,
        dim=dim,
        decoder=SharedKVStackConfig(
            layer=TransformerLayerConfig(attention=attention, feed_forward=feed_forward, norm=norm),
            num_layers=num_layers,
            reader=TransformerLayerConfig(attention=reading, feed_forward=feed_forward, norm=norm),
            num_readers=num_readers,
        ),
        norm=norm,
        z_loss=1e-6,
    )
