"""Configs of initialisers, linear maps and embeddings."""

from typing import Annotated, Any

from pippin.core.config import REQUIRED, Config, Required, Slot, field_hints
from pippin.core.config_tree import Modifier, inherit, traverse
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


class EmbeddingConfig(Config, implementation="pippin.layers.linear:Embedding", provides="embedding"):
    """One vector for each id, and logits by the same vectors where the output is tied to the input."""

    vocab_size: Required[int] = REQUIRED
    dim: Required[int] = REQUIRED
    # Drawn with fan_in = dim: a standard deviation of 1/sqrt(dim), as in AFM.
    init: Annotated[Config, Slot("initializer")] = FanInInitConfig()


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
        result = _with_lora(cfg, LoRALinearConfig(rank=rank, alpha=alpha), only, inside=only is None)
        if result == cfg:
            where = "" if only is None else f" inside {only!r}"
            kinds = sorted({c.PROVIDES for _, c in traverse(cfg)} - {""})
            raise ConfigError(
                f"lora: {type(cfg).__name__} holds no linear map without a LoRA{where}, so nothing would change. "
                f"It is composed of components that provide {', '.join(kinds)}."
            )
        return result

    return modifier


def _with_lora(value: Any, template: Config, only: str | None, inside: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_with_lora(v, template, only, inside) for v in value)
    if not isinstance(value, Config):
        return value
    inside = inside or only in (type(value).TYPE, type(value).PROVIDES)
    if type(value).PROVIDES == "linear":
        wrap = inside and not isinstance(value, LoRALinearConfig)
        return inherit(template.set(base=value), value) if wrap else value
    fields = {name: getattr(value, name) for name in field_hints(type(value))}
    new = {name: _with_lora(old, template, only, inside) for name, old in fields.items()}
    return value.set(**{name: v for name, v in new.items() if v != fields[name]})
