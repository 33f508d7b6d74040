"""Configs of layers that compute with the weights and keys that a compressed model will have."""

from typing import Annotated, Any

from pippin.core.config import Config, Slot
from pippin.core.config_tree import Modifier, inherit, transform
from pippin.core.errors import ConfigError
from pippin.layers.kernel_config import AttentionKernelConfig, AttentionShape, SelectKernelConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig, LoRALinearConfig, map_linears

_BITS = (1, 2, 3, 4, 6, 8)  # what a lookup table has


class FakeQuantLinearConfig(
    LinearConfig, implementation="pippin.layers.quant.fake_quant:FakeQuantLinear", provides="linear"
):
    """The same map by weights rounded to few levels, with a learned scale for each group of outputs."""

    bits: int = 2
    group_size: int = 16  # outputs that share a scale
    init_factor: float = (
        0.4  # of the largest weight of a group, for the highest level: 2 bits of a normal distribution
    )

    def validate(self) -> None:
        _require("FakeQuantLinear", self.bits, self.group_size, "output_dim", self.output_dim)


class FakeQuantEmbeddingConfig(
    EmbeddingConfig, implementation="pippin.layers.quant.fake_quant:FakeQuantEmbedding", provides="embedding"
):
    """The same vectors rounded to few levels, with a learned scale for each group of ids."""

    bits: int = 4
    group_size: int = 16  # ids that share a scale
    init_factor: float = 0.75

    def validate(self) -> None:
        _require("FakeQuantEmbedding", self.bits, self.group_size, "vocab_size", self.vocab_size)


class FakeQuantKVKernelConfig(
    AttentionKernelConfig,
    implementation="pippin.layers.quant.fake_quant_kv:FakeQuantKVKernel",
    provides="attention_kernel",
):
    """Attention to keys and values rounded to int8, as a cache of int8 holds them; computed by another kernel."""

    kernel: Annotated[Config, Slot("attention_kernel")] = SelectKernelConfig()

    def supports(self, shape: AttentionShape) -> str:
        if shape.page_size:
            return "it rounds keys that lie in no pages: those of a paged cache are rounded by the cache"
        return self.kernel.supports(shape) if isinstance(self.kernel, AttentionKernelConfig) else ""


def fake_quantized(
    bits: int = 2, embedding_bits: int = 4, group_size: int = 16, *, int8_cache: bool = True
) -> Modifier[Any]:
    """The modifier for quantisation-aware training: weights of few levels, and keys and values of int8.

    Linear maps, the embedding and a head of its own are rounded; routers, LoRAs, norms and the experts of a mixture are not.

    Args:
        bits: of a weight of a linear map.
        embedding_bits: of a number of the embedding.
        group_size: how many outputs, or ids, share a scale.
        int8_cache: whether keys and values are rounded too.

    Source: the 2025 report of AFM, arXiv:2507.13575, section on quantisation-aware training: 2 bits, 4 for the embedding,
    8 for keys and values.
    """

    def where(cfg: Config) -> bool | None:
        return False if cfg.PROVIDES == "router" else None

    def rounded(cfg: Config) -> Config:
        if isinstance(cfg, LoRALinearConfig):
            return cfg.set(base=rounded(cfg.base))
        fake = FakeQuantLinearConfig(bits=bits, group_size=group_size)
        return inherit(fake, cfg) if type(cfg) is LinearConfig else cfg

    def other(cfg: Config) -> Config:
        if type(cfg) is EmbeddingConfig:
            return inherit(FakeQuantEmbeddingConfig(bits=embedding_bits, group_size=group_size), cfg)
        if int8_cache and cfg.PROVIDES == "attention" and not isinstance(cfg.kernel, FakeQuantKVKernelConfig):  # type: ignore[attr-defined]
            return cfg.set(kernel=FakeQuantKVKernelConfig(kernel=cfg.kernel))  # type: ignore[attr-defined]
        return cfg

    return lambda cfg: transform(map_linears(cfg, rounded, where, inside=True), other)


def _require(what: str, bits: int, group_size: int, field: str, size: Any) -> None:
    if bits not in _BITS:
        raise ConfigError(f"{what}: bits ({bits}) must be one of {', '.join(map(str, _BITS))}.")
    if group_size < 1 or isinstance(size, int) and size % group_size:
        raise ConfigError(
            f"{what}: group_size ({group_size}) must divide {field} ({size}). Set it to a divisor, such as 16 or 8."
        )
