"""Attention of NVIDIA's cuDNN, through JAX."""

from typing import ClassVar, Literal

import jax
from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, attention_shape, visible
from pippin.layers.kernel_config import CuDNNKernelConfig, choose


class CuDNNKernel(Module):
    """Computes attention in one fused call; key heads are not repeated.

    Blocks that are not causal are skipped; what else is masked, by segment, window or
    padding, is read from a mask. On a mesh, JAX splits the call over sequences and heads.
    """

    Config = CuDNNKernelConfig

    implementation: ClassVar[Literal["xla", "cudnn"]] = "cudnn"

    def __init__(self, cfg: CuDNNKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result.

        Raises:
            ConfigError: the config does not support the call.
        """
        choose(self.cfg, attention_shape(q, kv, ctx, logits))
        mask = visible(ctx.positions, ctx.segment_ids, kv, logits.window)
        return jax.nn.dot_product_attention(
            q,
            kv.k.astype(q.dtype),
            kv.v.astype(q.dtype),
            mask=mask[:, None],
            scale=logits.scale,
            is_causal=True,
            implementation=self.implementation,
        )
