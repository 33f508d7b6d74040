"""The choice of an attention kernel for each call."""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Iterator

from jaxtyping import Array, Float

from pippin.core.module import Module
from pippin.core.registry import component_name
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, attention_shape
from pippin.layers.kernel_config import (
    AttentionShape,
    BlockwiseKernelConfig,
    Reasons,
    ReferenceKernelConfig,
    SelectKernelConfig,
    choose,
)
from pippin.layers.kernel_paged_config import PagedBlockwiseKernelConfig

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel serves calls of a shape, and why those before it do not."""

    shape: AttentionShape
    kernel: str
    passed_over: Reasons

    def __str__(self) -> str:
        s = self.shape
        limits = [f"window {s.window}"] if s.window else []
        limits += [f"soft cap {s.soft_cap:g}"] if s.soft_cap else []
        heads = f"{s.num_heads} heads of {s.head_dim} on {s.num_kv_heads} key heads"
        what = ", ".join([heads, f"{s.query_length} tokens", s.dtype, *limits])
        return "\n    ".join(
            [f"{what}: {self.kernel}", *(f"not {name}: {why}" for name, why in self.passed_over)]
        )


_choices: contextvars.ContextVar[dict[Choice, None] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def record_choices() -> Iterator[dict[Choice, None]]:
    """Collects the choices of all that is traced inside the block, each once, in their order."""
    found: dict[Choice, None] = {}
    token = _choices.set(found)
    try:
        yield found
    finally:
        _choices.reset(token)


class SelectKernel(Module):
    """Computes attention by the first of its kernels that supports the call.

    That one is chosen while the call is traced, by shapes and platform: no value is looked at.
    A call that falls to the reference, or to a blockwise kernel on an accelerator, logs a warning with all reasons, once.
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
        shape = attention_shape(q, kv, ctx, logits)
        chosen, passed_over = choose(self.cfg, shape)
        if (record := _choices.get()) is not None:
            record[Choice(shape, component_name(type(chosen)), passed_over)] = None
        slow = isinstance(chosen, ReferenceKernelConfig) or (
            isinstance(chosen, BlockwiseKernelConfig | PagedBlockwiseKernelConfig) and shape.platform != "cpu"
        )
        if passed_over and slow:
            _warn(component_name(type(chosen)), passed_over)
        return chosen.build()(q, kv, ctx, logits)


@functools.cache
def _warn(kernel: str, passed_over: Reasons) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    _logger.warning("attention is computed by %s, which is slow on this platform. %s.", kernel, reasons)
