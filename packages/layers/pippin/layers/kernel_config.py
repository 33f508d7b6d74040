"""Configs of attention kernels: ways to compute the same attention."""

from pippin.core.config import Config
from pippin.core.errors import ConfigError


class ReferenceKernelConfig(
    Config, implementation="pippin.layers.kernel:ReferenceKernel", provides="attention_kernel"
):
    """All logits of a head at once: simple, and the memory of T times S."""


class BlockwiseKernelConfig(
    Config, implementation="pippin.layers.kernel:BlockwiseKernel", provides="attention_kernel"
):
    """Blocks of queries, each against the keys that it can see: half the work where keys are aligned."""

    block_size: int = 128

    def validate(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"BlockwiseKernel: block_size ({self.block_size}) must be at least 1.")
