"""The recipes of compression by name. No JAX."""

from pippin.core.errors import ConfigError
from pippin.core.registry import nearest
from pippin.export.compress.config import (
    Float16Config,
    MixedPaletteConfig,
    PaletteConfig,
    RecipeConfig,
    ScaleConfig,
    Weighting,
)

DEFAULT_RECIPE = "palettize_4bit"  # of a package whose weights are floats
NO_RECIPE = "none"  # weights are stored as they are; the name of no recipe

# Recipe -> its config. Embeddings are int8 with a scale for each row, but in float16.
RECIPES = {
    "palettize_4bit": RecipeConfig(),
    "palettize_2bit": RecipeConfig(linear=PaletteConfig(bits=2)),
    "mixed_3_7": RecipeConfig(linear=MixedPaletteConfig(bits_per_weight=3.7)),
    "mixed_3_5": RecipeConfig(linear=MixedPaletteConfig(bits_per_weight=3.5)),
    "int8": RecipeConfig(linear=ScaleConfig()),
    "int4_block32": RecipeConfig(linear=ScaleConfig(bits=4, block_size=32, weighting=Weighting.LOSS)),
    "float16": RecipeConfig(linear=Float16Config(), embedding=Float16Config(), head=Float16Config()),
}


def recipe(name: str) -> RecipeConfig:
    """The recipe of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"there is no recipe {name!r}{nearest(name, RECIPES)}. Choose one of {', '.join(RECIPES)}."
        )
    return RECIPES[name]
