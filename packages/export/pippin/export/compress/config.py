"""The configs of compression: how each kind of weight is stored, and what text the model is measured on. No JAX."""

import enum

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.core.quantized_array import PALETTE_BITS, SCALED_BITS
from pippin.layers.linear_config import GroupedLinearConfig, LinearConfig


def _require_bits(what: str, bits: int, known: tuple[int, ...]) -> None:
    if bits not in known:
        raise ConfigError(f"{what}: bits ({bits}) must be one of {', '.join(map(str, known))}.")


class GroupAxis(enum.StrEnum):
    """What a group is made of."""

    OUTPUTS = "outputs"  # the weights of neighbouring outputs: columns of [inputs, outputs]
    INPUTS = "inputs"


class Weighting(enum.StrEnum):
    """How much an error in a weight counts."""

    NONE = "none"  # all errors alike
    ACTIVATIONS = "activations"  # by the mean square of the input that the weight is multiplied by
    LOSS = "loss"  # by how much the loss depends on it, by its gradients


class PaletteConfig(Config, implementation="pippin.export.compress.palettize:Palettizer"):
    """Lookup tables: each group of rows or columns has the centres of its weights, found by k-means.

    Source: Apple's foundation models, arXiv:2407.21075, section 5 (16 columns or rows share a table).
    """

    bits: int = 4
    group_size: int = 16
    axis: GroupAxis = GroupAxis.OUTPUTS
    weighting: Weighting = Weighting.LOSS

    def validate(self) -> None:
        _require_bits("Palette", self.bits, PALETTE_BITS)
        if self.group_size < 1:
            raise ConfigError(f"Palette: group_size ({self.group_size}) must be at least 1. Apple uses 16.")


class MixedPaletteConfig(Config):
    """Lookup tables of as many bits for each matrix as meet an average at the least loss."""

    bits_per_weight: float = 3.7  # of all linear maps together, tables counted
    choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    palette: PaletteConfig = PaletteConfig()  # but for the bits

    def validate(self) -> None:
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ConfigError(
                f"MixedPalette: choices ({self.choices}) must be different bits, in ascending order."
            )
        for bits in self.choices:
            _require_bits("MixedPalette", bits, PALETTE_BITS)
        if not 0 < self.bits_per_weight <= 16:
            raise ConfigError(
                f"MixedPalette: bits_per_weight ({self.bits_per_weight}) must be above 0, and 16 at most. 3.7 and 3.5 are "
                "what Apple names."
            )


class ScaleConfig(Config, implementation="pippin.export.compress.scaled:Scaler"):
    """Integers times a scale: of each output, or of each row of an embedding, or of blocks of these."""

    bits: int = 8
    block_size: int | None = None  # so many weights that are summed over share a scale; None: all
    weighting: Weighting = Weighting.NONE  # of 4 bits, which decide what is cut off

    def validate(self) -> None:
        _require_bits("Scale", self.bits, SCALED_BITS)
        if self.block_size is not None and self.block_size < 1:
            raise ConfigError(f"Scale: block_size ({self.block_size}) must be at least 1. 32 is usual.")


class Float16Config(Config):
    """The weights as they are, in float16."""


class TextConfig(Config):
    """On which text a model is measured. Without a file it is Python's own documentation, which every Python holds."""

    file: str | None = None  # UTF-8
    tokens: int = 8192  # at most
    sequence_length: int = 512

    def validate(self) -> None:
        if self.tokens < 1 or self.sequence_length < 1:
            raise ConfigError(
                f"Text: tokens ({self.tokens}) and sequence_length ({self.sequence_length}) must be at least 1."
            )


class RecipeConfig(Config):
    """How a model is compressed. What is neither a linear map nor an embedding is stored as float16; so are routers."""

    linear: PaletteConfig | MixedPaletteConfig | ScaleConfig | Float16Config = PaletteConfig()
    embedding: PaletteConfig | ScaleConfig | Float16Config = ScaleConfig()
    head: PaletteConfig | ScaleConfig | Float16Config = ScaleConfig()  # where the embedding is not the head
    calibration: TextConfig = TextConfig()  # read where weights are weighted, or bits allocated
    evaluation: TextConfig = TextConfig()  # other text than that


class ObservedLinearConfig(
    LinearConfig, implementation="pippin.export.compress.observed_linear:ObservedLinear", provides="linear"
):
    """The same map, which measures what goes through it."""


class ObservedGroupedLinearConfig(
    GroupedLinearConfig,
    implementation="pippin.export.compress.observed_linear:ObservedGroupedLinear",
    provides="grouped_linear",
):
    """The same maps, which measure what goes through each."""
