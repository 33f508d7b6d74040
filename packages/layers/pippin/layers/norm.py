"""Normalisations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pippin.core.module import Module, constant_init, parameter
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.precision import at_least_float32


class RMSNorm(Module):
    """Computes `x / sqrt(mean(x^2) + eps) * scale` in float32, and returns the dtype of `x`.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    Config = RMSNormConfig

    def __init__(self, cfg: RMSNormConfig, *, rngs: nnx.Rngs):
        self.scale = parameter(constant_init(1.0), rngs, (cfg.dim,), (None,), fan_in=1)
        self.eps = cfg.eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(at_least_float32(x.dtype))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(x32.dtype)
        return (x32 * inverse * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)
