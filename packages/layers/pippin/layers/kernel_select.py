"""The choice of an attention kernel for each call."""

import functools
import logging

from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, attention_shape
from pippin.layers.kernel_config import Reasons, ReferenceKernelConfig, SelectKernelConfig, choose

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


@functools.cache
def _warn(passed_over: Reasons) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    _logger.warning("attention is computed by ReferenceKernel, with all logits in memory. %s.", reasons)
