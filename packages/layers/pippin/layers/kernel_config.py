"""Configs of attention kernels: ways to compute the same attention, and why each cannot serve a call."""

import dataclasses
from collections.abc import Iterable
from typing import Annotated

from pippin.core.config import Config, Slot
from pippin.core.errors import ConfigError
from pippin.core.registry import component_name

_TILE = 128  # lanes of a TPU's vector registers: what splash attention's blocks are made of
_GPU_TILE = 16  # rows of what a GPU's matrix units multiply


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """All that a kernel may be chosen by: what is known of a call before any array is."""

    platform: str  # "cpu", "gpu" or "tpu"
    query_length: int
    key_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the queries, such as "bfloat16"
    aligned: bool  # key i is of the token of query i: training, or a whole text at once; not a cache
    window: int | None = None
    soft_cap: float | None = None
    has_bias: bool = False
    has_sinks: bool = False
    sequence_shards: int = 1  # how many ways the mesh splits the tokens of a sequence
    head_shards: int = 1  # likewise, the query heads
    kv_head_shards: int = 1
    page_size: int = 0  # of a paged cache, in tokens; 0: keys lie in rows of their own
    int8_pages: bool = False  # whose pages hold int8 numbers, with a scale for each token and head


class AttentionKernelConfig(Config):
    """The base of all kernels' configs."""

    def supports(self, shape: AttentionShape) -> str:
        """Why the kernel cannot serve a call of this shape; empty where it can."""
        raise NotImplementedError(f"{type(self).__name__}.supports")


class ReferenceKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel:ReferenceKernel",
    provides="attention_kernel",
):
    """All logits of a head at once: simple, and the memory of T times S."""

    def supports(self, shape: AttentionShape) -> str:
        del shape
        return ""


class BlockwiseKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel:BlockwiseKernel",
    provides="attention_kernel",
):
    """Blocks of queries, each against the keys that it can see: half the work where keys are aligned."""

    block_size: int = 128

    def validate(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"BlockwiseKernel: block_size ({self.block_size}) must be at least 1.")

    def supports(self, shape: AttentionShape) -> str:
        return first_reason((shape.page_size > 0, "keys are in pages, which PagedBlockwiseKernel is for"))


class SplashKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_splash:SplashKernel",
    provides="attention_kernel",
):
    """JAX's splash attention for TPUs: masked blocks are skipped, and no logits go to memory."""

    block_size: int = 512  # at most so many queries and so many keys at a time
    interpret: bool = False  # run on any platform, slowly: for tests

    def validate(self) -> None:
        if self.block_size < 1 or self.block_size % _TILE:
            raise ConfigError(
                f"SplashKernel: block_size ({self.block_size}) must be a positive multiple of {_TILE}, "
                "the width of a TPU's registers. 512 suits most models."
            )

    def supports(self, shape: AttentionShape) -> str:
        return first_reason(
            (
                shape.platform != "tpu" and not self.interpret,
                f"it runs on TPUs, and this is a {shape.platform}",
            ),
            _not_aligned(shape),
            (
                shape.query_length != shape.key_length,
                f"{shape.query_length} queries meet {shape.key_length} keys, and it masks by index",
            ),
            (shape.query_length % _TILE != 0, f"{shape.query_length} tokens are no multiple of {_TILE}"),
            (
                shape.dtype not in ("float32", "bfloat16"),
                f"it computes in float32 or bfloat16, not {shape.dtype}",
            ),
            (shape.head_dim > 256, f"head_dim ({shape.head_dim}) is above 256"),
            (shape.has_bias, "it adds no bias to logits"),
            _split_sequences(shape),
            uneven_heads(shape),
        )

    def block(self, length: int) -> int:
        """The largest block up to `block_size` that divides a supported length."""
        return max(b for b in range(_TILE, self.block_size + 1, _TILE) if length % b == 0)


class CuDNNKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_cudnn:CuDNNKernel",
    provides="attention_kernel",
):
    """Fused attention of NVIDIA's cuDNN. The mask of T times S, of one byte or two, is the same for all heads."""

    max_length: int = 16_384  # of queries and keys: the mask of one sequence takes its square

    def validate(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"CuDNNKernel: max_length ({self.max_length}) must be at least 1.")

    def supports(self, shape: AttentionShape) -> str:
        longest = max(shape.query_length, shape.key_length)
        return first_reason(
            (shape.platform != "gpu", f"it runs on NVIDIA GPUs, and this is a {shape.platform}"),
            (
                shape.dtype not in ("float16", "bfloat16"),
                f"it computes in float16 or bfloat16, not {shape.dtype}",
            ),
            (
                shape.head_dim > 128 or shape.head_dim % 8 != 0,
                f"head_dim ({shape.head_dim}) is no multiple of 8 up to 128",
            ),
            _not_aligned(shape),
            (
                shape.query_length != shape.key_length,
                f"{shape.query_length} queries meet {shape.key_length} keys",
            ),
            (shape.query_length % 2 != 0, f"{shape.query_length} tokens are an odd number"),
            (longest > self.max_length, f"{longest} tokens are more than max_length ({self.max_length})"),
            (shape.soft_cap is not None, "it has no soft cap"),
            (shape.has_bias, "a bias for each head would fill T times S of memory"),
            (shape.has_sinks, "it has no sinks"),
            _split_sequences(shape),
        )


class TritonKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_triton:TritonKernel",
    provides="attention_kernel",
):
    """A Pallas kernel for NVIDIA GPUs of what cuDNN refuses: wide heads, a soft cap, sinks, float32, long texts."""

    block_size: int = 64  # at most so many queries and so many keys at a time
    interpret: bool = False  # run on any platform, slowly: for tests

    def validate(self) -> None:
        if self.block_size < _GPU_TILE or self.block_size & (self.block_size - 1):
            raise ConfigError(
                f"TritonKernel: block_size ({self.block_size}) must be a power of two from {_GPU_TILE} on: its blocks "
                "are operands of matrix units. 64 suits most models."
            )

    def supports(self, shape: AttentionShape) -> str:
        return first_reason(
            (
                shape.platform != "gpu" and not self.interpret,
                f"it runs on NVIDIA GPUs, and this is a {shape.platform}",
            ),
            _not_aligned(shape),
            (
                shape.query_length != shape.key_length,
                f"{shape.query_length} queries meet {shape.key_length} keys, and it masks by index",
            ),
            (
                shape.query_length % _GPU_TILE != 0,
                f"{shape.query_length} tokens are no multiple of {_GPU_TILE}",
            ),
            (
                shape.dtype not in ("float16", "bfloat16", "float32"),
                f"it computes in float16, bfloat16 or float32, not {shape.dtype}",
            ),
            (shape.head_dim > 256, f"head_dim ({shape.head_dim}) is above 256"),
            (shape.has_bias, "it adds no bias to logits"),
            _split_sequences(shape),
            uneven_heads(shape),
        )

    def block(self, length: int, row_bytes: int) -> int:
        """The largest block up to `block_size` that divides a supported length, and that the memory of a processor has."""
        most = min(self.block_size, max(_GPU_TILE, 32_768 // row_bytes))
        return next(b for b in (most >> i for i in range(most)) if length % b == 0)


class RingKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_ring:RingKernel",
    provides="attention_kernel",
):
    """Attention over sequences that the mesh splits: keys and values go round the devices, and no device has all."""

    block_size: int = 512  # at most so many queries of a device meet its keys at a time

    def validate(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"RingKernel: block_size ({self.block_size}) must be at least 1.")

    def supports(self, shape: AttentionShape) -> str:
        return first_reason(
            (shape.sequence_shards == 1, "no mesh splits the sequences"),
            _not_aligned(shape),
            (
                shape.query_length % (2 * shape.sequence_shards) != 0,
                f"{shape.query_length} tokens are no multiple of {2 * shape.sequence_shards}, twice the devices of a ring",
            ),
            (shape.has_bias, "it adds no bias to logits"),
            uneven_heads(shape),
        )


class SelectKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.kernel_select:SelectKernel",
    provides="attention_kernel",
):
    """The first of several kernels that supports the call, on the platform that runs it."""

    kernels: tuple[Annotated[Config, Slot("attention_kernel")], ...] = (
        SplashKernelConfig(),
        CuDNNKernelConfig(),
        TritonKernelConfig(),
        RingKernelConfig(),
        BlockwiseKernelConfig(),
    )

    def validate(self) -> None:
        for kernel in self.kernels:
            if not isinstance(kernel, AttentionKernelConfig):
                raise ConfigError(
                    f"SelectKernel: {type(kernel).TYPE} cannot say what it supports. Derive its config from "
                    "AttentionKernelConfig, or use it as the layer's only kernel."
                )
        if not self.kernels:
            raise ConfigError("SelectKernel: kernels is empty. Name the kernels to choose from, best first.")

    def supports(self, shape: AttentionShape) -> str:
        passed_over = _try(self.kernels, shape)[1]
        return "" if len(passed_over) < len(self.kernels) else _listed(passed_over)


Reasons = tuple[tuple[str, str], ...]  # (the kernel's name, why it cannot serve the call), in order


def choose(cfg: Config, shape: AttentionShape) -> tuple[Config, Reasons]:
    """The kernel that serves a call, and why each one before it does not.

    A config that chooses nothing is its own choice.

    Raises:
        ConfigError: it cannot serve the call; all reasons are named.
    """
    if not isinstance(cfg, AttentionKernelConfig):
        return cfg, ()  # one of the user's own, which says nothing
    candidates = cfg.kernels if isinstance(cfg, SelectKernelConfig) else (cfg,)
    chosen, passed_over = _try(candidates, shape)
    if chosen is None:
        raise ConfigError(
            f"no attention kernel supports {shape.query_length} queries of {shape.num_heads} heads of "
            f"{shape.head_dim} on {shape.platform}: {_listed(passed_over)}. Add BlockwiseKernel to the kernels, "
            "which supports every call (with a paged cache: use the modifier paged), or change what one of them refuses."
        )
    if not isinstance(chosen, SelectKernelConfig):
        return chosen, passed_over
    nested, more = choose(chosen, shape)
    return nested, passed_over + more


def _try(kernels: Iterable[Config], shape: AttentionShape) -> tuple[Config | None, Reasons]:
    passed_over: list[tuple[str, str]] = []
    for kernel in kernels:
        reason = kernel.supports(shape)
        if not reason:
            return kernel, tuple(passed_over)
        passed_over.append((component_name(type(kernel)), reason))
    return None, tuple(passed_over)


def _listed(reasons: Reasons) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons)


def uneven_heads(shape: AttentionShape) -> tuple[bool, str]:
    """Whether the mesh splits queries otherwise than the keys that they attend to, and the reason that this is."""
    return (
        shape.head_shards != shape.kv_head_shards,
        f"the mesh splits query heads {shape.head_shards} ways and key heads {shape.kv_head_shards} ways",
    )


def _split_sequences(shape: AttentionShape) -> tuple[bool, str]:
    return (
        shape.sequence_shards > 1,
        f"the mesh splits sequences {shape.sequence_shards} ways, which RingKernel is for",
    )


def _not_aligned(shape: AttentionShape) -> tuple[bool, str]:
    return not shape.aligned, "keys are not those of the queries' tokens, as with a cache"


def first_reason(*checks: tuple[bool, str]) -> str:
    return next((reason for fails, reason in checks if fails), "")
