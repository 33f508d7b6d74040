"""The choice of an attention kernel for each call."""

import functools
import logging

import jax
from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.core.sharding import mesh_in_use
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import (
    AttentionShape,
    Reasons,
    ReferenceKernelConfig,
    SelectKernelConfig,
    choose,
)

_logger = logging.getLogger(__name__)


class SelectKernel(Module):
    """Computes attention by the first of its kernels that supports the call.

    That one is chosen while the call is traced, by shapes and platform: no value is looked at.
    A call that only the reference is left for logs a warning with all reasons, once.
    """

    Config = SelectKernelConfig

    def __init__(self, cfg: SelectKernelConfig):
        self.cfg = cfg

    def __call__(
        self, q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
    ) -> Float[Array, "B T N H"]:
        """The result of the kernel chosen.

        Raises:
            ConfigError: no kernel supports the call.
        """
        chosen, passed_over = choose(self.cfg, attention_shape(q, kv, ctx, logits))
        if passed_over and isinstance(chosen, ReferenceKernelConfig):
            _warn(passed_over)
        return chosen.build()(q, kv, ctx, logits)


def attention_shape(
    q: Float[Array, "B T N H"], kv: KeyValues, ctx: Context, logits: Logits
) -> AttentionShape:
    """What a kernel is chosen by, of a call inside a program for the mesh in use, if there is one."""
    active = mesh_in_use()
    shards = 1
    if active is not None:
        cfg, mesh = active
        split = cfg.spec(("batch", "sequence"))[1]
        for axis in (split,) if isinstance(split, str) else split or ():
            shards *= mesh.shape[axis]
    bias = None if logits.bias is None else jax.eval_shape(logits.bias, ctx.positions, kv.positions)
    _, query_length, num_heads, head_dim = q.shape
    return AttentionShape(
        platform=_platform(),
        query_length=query_length,
        key_length=kv.k.shape[1],
        num_heads=num_heads,
        num_kv_heads=kv.k.shape[2],
        head_dim=head_dim,
        dtype=q.dtype.name,
        aligned=kv.aligned,
        window=logits.window,
        soft_cap=logits.soft_cap,
        # A position encoding without a bias says so by returning none.
        has_bias=bias is not None,
        has_sinks=logits.sinks is not None,
        sequence_shards=shards,
    )


def _platform() -> str:
    """That of the mesh, whose devices need not be here: programs for TPUs are compiled on other machines."""
    active = mesh_in_use()
    name = jax.default_backend() if active is None else active[1].devices.flat[0].platform
    return "gpu" if name == "cuda" else name


@functools.cache
def _warn(passed_over: Reasons) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    _logger.warning("attention is computed by ReferenceKernel, with all logits in memory. %s.", reasons)
