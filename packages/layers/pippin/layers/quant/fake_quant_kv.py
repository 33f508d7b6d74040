"""Attention to keys and values that are rounded as an int8 cache rounds them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.layers.context import Context, KeyValues
from pippin.layers.int8 import quantized
from pippin.layers.kernel import Logits, attention_shape
from pippin.layers.kernel_config import choose
from pippin.layers.quant.fake_quant_config import FakeQuantKVKernelConfig


class FakeQuantKVKernel(Module):
    """Computes attention to the numbers that int8 leaves of keys and values, by another kernel.

    Each token and head has a scale of its own, as in the int8 pages that a model is served from: what is trained is what is
    served. Gradients pass as if nothing were rounded.

    Source: the 2025 report of AFM, arXiv:2507.13575, rounds keys and values to int8 in training, behind their norm; with one
    scale for a tensor, an average over steps, where this has one for each vector.
    """

    Config = FakeQuantKVKernelConfig

    def __init__(self, cfg: FakeQuantKVKernelConfig):
        self.cfg, self.kernel = cfg, cfg.kernel.build()

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result.

        Raises:
            ConfigError: the other kernel does not support the call, or keys lie in pages.
        """
        choose(self.cfg, attention_shape(q, kv, ctx, logits))
        return self.kernel(q, dataclasses.replace(kv, k=_rounded(kv.k), v=_rounded(kv.v)), ctx, logits)


def _rounded(values: Float[Array, "B S K H"]) -> Float[Array, "B S K H"]:
    integers, scale = quantized(values)
    kept = (integers.astype(jnp.float32) * scale[..., None]).astype(values.dtype)
    return values + jax.lax.stop_gradient(kept - values)
