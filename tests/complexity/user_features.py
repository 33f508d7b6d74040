"""Two components as a user would write them: in a file of their own, unknown to every package.

No file under packages/ names them or imports this file: the report counts that.
They use what the packages offer, and declare which interface they provide.
"""

from typing import Annotated

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core import config
from pippin.core.config import REQUIRED, Required, Slot
from pippin.core.module import Module
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.moe_config import MoEConfig


class LogDistance(Module):
    """Adds `-scale * log(1 + slope * (query position - key position))` to the logits of every head.

    Source: Chi et al. 2022, arXiv:2205.09921, section 3.2 (KERPLE, its logarithmic
    variant), with fixed factors.
    """

    class Config(config.Config, provides="position"):
        head_dim: Required[int] = REQUIRED
        num_heads: Required[int] = REQUIRED
        scale: float = 2.0
        slope: float = 1.0

    def __init__(self, cfg: Config):
        self.scale, self.slope, self.num_heads = cfg.scale, cfg.slope, cfg.num_heads

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        return x

    def bias(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
        # A key that lies behind its query is masked; its distance must only keep the logarithm finite.
        distance = jnp.maximum(query[:, :, None] - key[:, None, :], 0).astype(jnp.float32)
        bias = -self.scale * jnp.log1p(self.slope * distance)
        return jnp.broadcast_to(bias[:, None], (bias.shape[0], self.num_heads, *bias.shape[1:]))


class SharedExpertMoE(Module):
    """Computes `shared(x) + routed(x)`: a feed-forward for every token beside a mixture of experts.

    Source: Dai et al. 2024, arXiv:2401.06066, section 3.2 (shared expert isolation).
    """

    class Config(config.Config, provides="feed_forward"):
        input_dim: Required[int] = REQUIRED
        shared: Annotated[config.Config, Slot("feed_forward")] = FeedForwardConfig()
        routed: Annotated[config.Config, Slot("feed_forward")] = MoEConfig()

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.shared = cfg.shared.set(input_dim=cfg.input_dim).build(rngs=rngs)
        self.routed = cfg.routed.set(input_dim=cfg.input_dim).build(rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.shared(x) + self.routed(x)
