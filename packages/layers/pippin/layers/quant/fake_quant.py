"""Linear maps and embeddings that are trained with the rounded weights which will be stored."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.module import constant_init, parameter
from pippin.layers.linear import Embedding, Linear
from pippin.layers.quant.fake_quant_config import FakeQuantEmbeddingConfig, FakeQuantLinearConfig

_FLOAT32 = jnp.dtype(jnp.float32)


class FakeQuantLinear(Linear):
    """Computes `x @ rounded(weight) + bias`; see `rounded`.

    `factor` is its own parameter beside those of `Linear`: the largest level of each group of outputs, over the largest
    weight of the group.

    Source: the 2025 report of AFM, arXiv:2507.13575: balanced levels (-1.5, -0.5, 0.5, 1.5 at 2 bits) and a learned scale.
    """

    Config = FakeQuantLinearConfig

    def __init__(self, cfg: FakeQuantLinearConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        groups = (cfg.output_dim // cfg.group_size,)
        self.factor = parameter(constant_init(cfg.init_factor), rngs, groups, (None,), fan_in=1)
        self.bits = cfg.bits

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = x @ rounded(self.weight[...].T, self.factor[...], self.bits).T.astype(x.dtype)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


class FakeQuantEmbedding(Embedding):
    """Looks up rounded vectors, and makes logits of them; see `rounded`. Ids in groups share a scale."""

    Config = FakeQuantEmbeddingConfig

    def __init__(self, cfg: FakeQuantEmbeddingConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        groups = (cfg.vocab_size // cfg.group_size,)
        self.factor = parameter(constant_init(cfg.init_factor), rngs, groups, (None,), fan_in=1)
        self.bits = cfg.bits

    def __call__(self, ids: Int[Array, "*B"], dtype: jnp.dtype = _FLOAT32) -> Float[Array, "*B D"]:
        return jnp.take(self._rounded(), ids, axis=0).astype(dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return x @ self._rounded().astype(x.dtype).T

    def _rounded(self) -> Float[Array, "V D"]:
        return rounded(self.weight[...], self.factor[...], self.bits)


# The scale of a group of zeros, so small that float16 has zeros for its levels.
_TINY = 1e-12


def rounded(weight: Float[Array, "R C"], factor: Float[Array, " G"], bits: int) -> Float[Array, "R C"]:
    """The nearest of 2**bits levels for each weight: numbers of float16, as a lookup table holds them.

    Rows in groups share a scale, which is `factor * max|weight|` over the highest level. The levels are -1.5, -0.5, 0.5
    and 1.5 times it at 2 bits, and likewise at others: as many below zero as above.

    Gradients: a weight between the outer levels passes its own on, and one beyond them none. The factor's is that of the
    scale, where what was rounded away counts as constant, and the largest weight too.

    Source: Esser et al. 2019, arXiv:1902.08153, section 2.1 (the gradient of a scale); the levels, and the scale in terms of
    the largest weight, as in AFM 2025.
    """
    values, levels, scale = _levels(weight, factor, bits)
    nearest = values + jax.lax.stop_gradient(levels - values)
    exact = scale * nearest
    halves = exact.astype(jnp.float16).astype(exact.dtype)
    return (exact + jax.lax.stop_gradient(halves - exact)).reshape(weight.shape)


def palette(weight: Float[Array, "R C"], factor: Float[Array, " G"], bits: int) -> tuple[Any, Any]:
    """What `rounded` chooses for each weight, and from what.

    Returns:
        indices: uint8 [R, C], into the table of the row's group.
        luts: float16 [G, 2**bits].
    """
    _, levels, scale = _levels(weight, factor, bits)
    most = _most(bits)
    all_levels = jnp.arange(2**bits, dtype=weight.dtype)[None] - most
    return (
        (levels + most).astype(jnp.uint8).reshape(weight.shape),
        (scale[:, :, 0] * all_levels).astype(jnp.float16),
    )


def _levels(
    weight: Float[Array, "R C"], factor: Float[Array, " G"], bits: int
) -> tuple[Float[Array, "G W C"], Float[Array, "G W C"], Float[Array, "G 1 1"]]:
    """Weights in units of their group's scale and clipped to the outer levels; the nearest levels; the scales."""
    grouped = weight.reshape(factor.shape[0], -1, weight.shape[1])
    most = _most(bits)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(grouped), axis=(1, 2), keepdims=True))
    scale = factor[:, None, None] * jnp.maximum(largest, _TINY) / most
    values = jnp.clip(grouped / scale, -most, most)
    return values, jnp.minimum(jnp.floor(values) + 0.5, most), scale


def _most(bits: int) -> float:
    return (2**bits - 1) / 2
