"""Configs of initialisers, linear maps and embeddings."""

import enum
from collections.abc import Callable
from typing import Annotated, Any

from pippin.core.config import REQUIRED, Config, Required, Slot, field_hints
from pippin.core.config_tree import Modifier, inherit, transform, traverse
from pippin.core.errors import ConfigError


class FanInInitConfig(Config, implementation="pippin.layers.linear:FanInInit", provides="initializer"):
    """N(0, scale / fan_in), so that outputs keep the variance of inputs."""

    scale: float = 1.0


class NormalInitConfig(Config, implementation="pippin.layers.linear:NormalInit", provides="initializer"):
    """N(0, stddev^2), whatever the shape."""

    stddev: float = 0.02


class LinearConfig(Config, implementation="pippin.layers.linear:Linear", provides="linear"):
    """`x @ weight + bias`. The holder sets the dims and their logical axes."""

    input_dim: Required[int] = REQUIRED
    output_dim: Required[int] = REQUIRED
    input_axis: str | None = "embed"
    output_axis: str | None = None
    bias: bool = False
    init: Annotated[Config, Slot("initializer")] = FanInInitConfig()


class MatmulType(enum.StrEnum):
    """The numbers of which a matrix product is computed."""

    INT8 = "int8"
    FP8 = "fp8"  # E4M3 forward, and E5M2 for gradients


class QuantizedLinearConfig(
    LinearConfig, implementation="pippin.layers.linear_quantized:QuantizedLinear", provides="linear"
):
    """The same map, with the same parameters, of 8-bit numbers: faster where the hardware multiplies these faster."""

    matmul: MatmulType = MatmulType.INT8


def quantize_matmuls(matmul: MatmulType) -> Modifier[Any]:
    """The modifier that makes the linear maps of attention and of feed-forwards multiply 8-bit numbers.

    Routers, embeddings and the head stay as they are, and the experts of a mixture too.
    """

    def where(cfg: Config) -> bool | None:
        return {"router": False, "attention": True, "feed_forward": True}.get(cfg.PROVIDES)

    def quantized(cfg: Config) -> Config:
        if isinstance(cfg, LoRALinearConfig):
            return cfg.set(base=quantized(cfg.base))
        return inherit(QuantizedLinearConfig(matmul=matmul), cfg) if type(cfg) is LinearConfig else cfg

    return lambda cfg: map_linears(cfg, quantized, where, inside=False)


class EmbeddingConfig(Config, implementation="pippin.layers.linear:Embedding", provides="embedding"):
    """One vector for each id, and logits by the same vectors where the output is tied to the input."""

    vocab_size: Required[int] = REQUIRED
    dim: Required[int] = REQUIRED
    # Drawn with fan_in = dim: a standard deviation of 1/sqrt(dim), as in AFM.
    init: Annotated[Config, Slot("initializer")] = FanInInitConfig()


class Int8LinearConfig(
    LinearConfig, implementation="pippin.layers.linear_int8:Int8Linear", provides="linear"
):
    """The same map with weights of int8 and a scale for each output: not to be trained."""


class Int8EmbeddingConfig(
    EmbeddingConfig, implementation="pippin.layers.linear_int8:Int8Embedding", provides="embedding"
):
    """The same vectors of int8 and a scale for each: not to be trained."""


def int8_weights(cfg: Any) -> Any:
    """A tree whose linear maps and embeddings keep int8 numbers. Routers, LoRAs and the experts of a mixture stay."""

    def where(cfg: Config) -> bool | None:
        return False if cfg.PROVIDES == "router" else None

    def changed(cfg: Config) -> Config:
        if isinstance(cfg, LoRALinearConfig):
            return cfg.set(base=changed(cfg.base))
        return inherit(Int8LinearConfig(), cfg) if type(cfg) in (LinearConfig, QuantizedLinearConfig) else cfg

    def embedded(cfg: Config) -> Config:
        return inherit(Int8EmbeddingConfig(), cfg) if type(cfg) is EmbeddingConfig else cfg

    return transform(map_linears(cfg, changed, where, inside=True), embedded)


class GroupedLinearConfig(
    Config, implementation="pippin.layers.linear:GroupedLinear", provides="grouped_linear"
):
    """One linear map for each group of rows, without bias: the experts of a mixture."""

    num_groups: Required[int] = REQUIRED
    input_dim: Required[int] = REQUIRED
    output_dim: Required[int] = REQUIRED
    input_axis: str | None = "embed"
    output_axis: str | None = None
    init: Annotated[Config, Slot("initializer")] = FanInInitConfig()


class LoRALinearConfig(Config, implementation="pippin.layers.linear:LoRALinear", provides="linear"):
    """A linear map plus a trained low-rank one: `base(x) + alpha / rank * x @ down @ up`.

    Train it with the base frozen; `up` starts at zero, so the sum starts as the base.
    """

    input_dim: Required[int] = REQUIRED
    output_dim: Required[int] = REQUIRED
    input_axis: str | None = "embed"
    output_axis: str | None = None
    base: Annotated[Config, Slot("linear")] = LinearConfig()
    rank: int = 16
    alpha: float = 16.0

    def validate(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRALinear: rank ({self.rank}) must be at least 1. AFM uses 16 or 32.")


def lora(rank: int = 16, alpha: float = 16.0, only: str | None = None) -> Modifier[Any]:
    """The modifier that puts a LoRA around every linear map of a tree. A map that has one keeps it.

    The experts of a mixture are no linear maps: they stay as they are.

    Args:
        rank: of the low-rank maps.
        alpha: their scale, times the rank.
        only: a type name or interface; then only the maps inside such components, such as "attention".

    Raises:
        ConfigError: (the modifier) the tree has no such map.
    """

    def modifier(cfg: Config) -> Config:
        def where(cfg: Config) -> bool | None:
            return True if only in (cfg.TYPE, cfg.PROVIDES) else None

        def wrapped(cfg: Config) -> Config:
            template = LoRALinearConfig(rank=rank, alpha=alpha)
            return cfg if isinstance(cfg, LoRALinearConfig) else inherit(template.set(base=cfg), cfg)

        result = map_linears(cfg, wrapped, where, inside=only is None)
        if result == cfg:
            inside = "" if only is None else f" inside {only!r}"
            kinds = sorted({c.PROVIDES for _, c in traverse(cfg)} - {""})
            raise ConfigError(
                f"lora: {type(cfg).__name__} holds no linear map without a LoRA{inside}, so nothing would change. "
                f"It is composed of components that provide {', '.join(kinds)}."
            )
        return result

    return modifier


class MultiLoRALinearConfig(
    Config, implementation="pippin.layers.linear_multi_lora:MultiLoRALinear", provides="linear"
):
    """A linear map plus, for each row of a batch, one of several low-rank ones: `base(x) + x @ down[i] @ up[i]`.

    For serving a model with many adapters at once. Map 0 is none.
    """

    input_dim: Required[int] = REQUIRED
    output_dim: Required[int] = REQUIRED
    input_axis: str | None = "embed"
    output_axis: str | None = None
    base: Annotated[Config, Slot("linear")] = LinearConfig()
    num_adapters: int = 8
    rank: int = 16  # of the largest

    def validate(self) -> None:
        if self.num_adapters < 1 or self.rank < 1:
            raise ConfigError(
                f"MultiLoRALinear: num_adapters ({self.num_adapters}) and rank ({self.rank}) must be at least 1."
            )


def multi_lora(num_adapters: int = 8, rank: int = 16) -> Modifier[Any]:
    """The modifier that gives every linear map of a tree room for so many adapters of at most such a rank.

    A map that has a LoRA of its own keeps it within. Routers stay as they are.
    """
    template = MultiLoRALinearConfig(num_adapters=num_adapters, rank=rank)

    def where(cfg: Config) -> bool | None:
        return False if cfg.PROVIDES == "router" else None

    return lambda cfg: map_linears(
        cfg, lambda linear: inherit(template.set(base=linear), linear), where, inside=True
    )


def map_linears(
    value: Any, change: Callable[[Config], Config], where: Callable[[Config], bool | None], inside: bool
) -> Any:
    """A tree with the linear maps of some parts changed. `where` says of a part whether it counts; None: as what holds it."""
    if isinstance(value, tuple):
        return tuple(map_linears(v, change, where, inside) for v in value)
    if not isinstance(value, Config):
        return value
    here = where(value)
    inside = inside if here is None else here
    if value.PROVIDES == "linear":
        return change(value) if inside else value
    fields = {name: getattr(value, name) for name in field_hints(type(value))}
    new = {name: map_linears(old, change, where, inside) for name, old in fields.items()}
    return value.set(**{name: v for name, v in new.items() if v != fields[name]})
