"""AFM server, 2024: the dense design of the on-device model in a larger size that was never published.

Published: the design, and a vocabulary of "100K". Unknown: every size. The
defaults below are ours, not Apple's, and make 44.3B parameters:

    vocabulary      102,400 = 100 x 1024, as the other vocabularies of AFM are 48 and 150 x 1024
    dim             8192, with heads of 128 and 8 key and value heads, as on the device
    hidden dim      21,504, the same 2.625 times the dim as on the device
    layers          64

Source: Gunter et al. 2024, arXiv:2407.21075, section 2.
"""

from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024


def afm_server_2024(
    *,
    vocab_size: int = 102_400,
    dim: int = 8192,
    num_layers: int = 64,
    num_heads: int = 64,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    hidden_dim: int = 21_504,
) -> CausalLMConfig:
    """The design of the on-device model in the sizes that are given; their defaults are guesses."""
    return afm_on_device_2024(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
    )
