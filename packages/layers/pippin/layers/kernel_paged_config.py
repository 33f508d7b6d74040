"""Configs of attention kernels that read a paged cache, and the modifier that gives a model one."""

from collections.abc import Callable
from typing import Any

from pippin.core.config import Config
from pippin.core.config_tree import inherit, transform
from pippin.core.errors import ConfigError
from pippin.layers.cache_config import PagedCacheConfig
from pippin.layers.kernel_config import (
    AttentionKernelConfig,
    AttentionShape,
    SelectKernelConfig,
    first_reason,
    uneven_heads,
)

_NO_PAGES = "keys are in no pages, as those of a PagedCache are"
_INT8 = "it reads no int8 pages with a scale for each token and head"


def _check_block(name: str, size: int, least: int = 1) -> None:
    if size < least or size & (size - 1):
        raise ConfigError(f"{name}: a block's size ({size}) must be a power of two from {least} on.")


class PagedBlockwiseKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_paged:PagedBlockwiseKernel",
    provides="attention_kernel",
):
    """The pages of all rows, some at a time: as many turns as the longest row has blocks."""

    block_size: int = 64  # keys of each row at a time, in whole pages

    def validate(self) -> None:
        _check_block("PagedBlockwiseKernel", self.block_size)

    def supports(self, shape: AttentionShape) -> str:
        return first_reason((shape.page_size == 0, _NO_PAGES))


class PagedTPUKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_paged_tpu:PagedTPUKernel",
    provides="attention_kernel",
):
    """JAX's ragged paged attention for TPUs: each page is read once, and rows have any number of queries."""

    block_size: int = 512  # keys at a time, in whole pages
    query_block_size: int = 32  # queries at a time, of one row or of several

    def validate(self) -> None:
        _check_block("PagedTPUKernel", self.block_size)
        _check_block("PagedTPUKernel", self.query_block_size)

    def supports(self, shape: AttentionShape) -> str:
        packed = {"float32": 1, "bfloat16": 2}.get(shape.dtype, 1)  # numbers in a word of 32 bits
        words = 2 * shape.num_kv_heads // shape.kv_head_shards // packed
        return first_reason(
            (shape.page_size == 0, _NO_PAGES),
            (shape.platform != "tpu", f"it runs on TPUs, and this is a {shape.platform}"),
            (shape.int8_pages, _INT8),
            (
                shape.dtype not in ("float32", "bfloat16"),
                f"it computes in float32 or bfloat16, not {shape.dtype}",
            ),
            (shape.head_dim % 128 != 0, f"head_dim ({shape.head_dim}) is no multiple of 128"),
            (
                words not in (1, 2, 4, 8) and words % 8 != 0,
                f"a device's {shape.num_kv_heads // shape.kv_head_shards} key heads do not fill its registers",
            ),
            (shape.has_bias, "it adds no bias to logits"),
            (shape.has_sinks, "it has no sinks"),
            uneven_heads(shape),
        )


class PagedTritonKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_paged_triton:PagedTritonKernel",
    provides="attention_kernel",
):
    """A Pallas kernel for NVIDIA GPUs: a program for each row, key head and block of queries."""

    block_size: int = 64  # keys at a time, in whole pages; and at most so many queries times heads
    interpret: bool = False  # run on any platform, slowly: for tests

    def validate(self) -> None:
        _check_block("PagedTritonKernel", self.block_size, least=16)

    def supports(self, shape: AttentionShape) -> str:
        return first_reason(
            (shape.page_size == 0, _NO_PAGES),
            (
                shape.platform != "gpu" and not self.interpret,
                f"it runs on NVIDIA GPUs, and this is a {shape.platform}",
            ),
            (shape.int8_pages, _INT8),
            (
                shape.dtype not in ("float16", "bfloat16", "float32"),
                f"it computes in float16, bfloat16 or float32, not {shape.dtype}",
            ),
            (
                shape.head_dim not in (16, 32, 64, 128, 256),
                f"head_dim ({shape.head_dim}) is no power of two from 16 to 256",
            ),
            (
                shape.page_size > self.block_size,
                f"pages of {shape.page_size} tokens are more than block_size ({self.block_size})",
            ),
            (shape.has_bias, "it adds no bias to logits"),
            uneven_heads(shape),
        )


PAGED_KERNELS = (PagedTPUKernelConfig(), PagedTritonKernelConfig(), PagedBlockwiseKernelConfig())


def paged(page_size: int = 16, num_pages: int | None = None, *, int8: bool = False) -> Callable[[Any], Any]:
    """The modifier that gives a model a paged cache, and kernels that read it.

    Args:
        page_size: tokens a page.
        num_pages: of each layer; None: as many as all rows can fill, and each row has its own from the start.
        int8: whether keys and values are kept as int8, with a scale for each token and head.

    Raises:
        ConfigError: (the modifier) the tree has no cache.
    """
    cache = PagedCacheConfig(page_size=page_size, num_pages=num_pages, int8=int8)

    def change(cfg: Config) -> Config:
        if cfg.PROVIDES == "kv_cache":
            return inherit(cache, cfg)
        return SelectKernelConfig(kernels=PAGED_KERNELS) if isinstance(cfg, SelectKernelConfig) else cfg

    def modifier(cfg: Config) -> Config:
        changed = transform(cfg, change)
        if changed == cfg:
            raise ConfigError(
                f"paged: {type(cfg).__name__} holds neither a cache nor a choice of kernels, so nothing would change. "
                "Give it a model that has attention."
            )
        return changed

    return modifier
