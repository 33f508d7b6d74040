"""Feed-forwards."""

import functools
from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.core.sharding import constrain
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    Activation.SILU: jax.nn.silu,
    Activation.GELU: partial(jax.nn.gelu, approximate=True),
    Activation.RELU: jax.nn.relu,
}


@functools.cache
def gated(activation: Activation) -> Callable[[Array, Array], Array]:
    """`activation(gate) * up`, of which the backward pass keeps the two arguments alone.

    What is between them is computed again: SiLU would otherwise keep three more arrays of their size, and the
    time to write and read these is longer than that of computing them.
    """
    act = ACTIVATIONS[activation]
    return jax.checkpoint(lambda gate, up: act(gate) * up)


class FeedForward(Module):
    """Computes `down(activation(gate(x)) * up(x))`.

    Source: Shazeer 2020, arXiv:2002.05202, section 2 (SwiGLU with SiLU).
    """

    Config = FeedForwardConfig

    def __init__(self, cfg: FeedForwardConfig, *, rngs: nnx.Rngs):
        into = {"input_dim": cfg.input_dim, "output_dim": cfg.hidden_dim, "output_axis": "mlp"}
        self.gate_proj = cfg.gate_proj.set(**into).build(rngs=rngs)
        self.up_proj = cfg.up_proj.set(**into).build(rngs=rngs)
        out_of = {
            "input_dim": cfg.hidden_dim,
            "output_dim": cfg.input_dim,
            "input_axis": "mlp",
            "output_axis": "embed",
        }
        self.down_proj = cfg.down_proj.set(**out_of).build(rngs=rngs)
        self.gate = gated(cfg.activation)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = self.gate(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(constrain(hidden, "batch", "sequence", "mlp"))
