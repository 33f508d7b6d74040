"""Recipes: named trainer configs, found by `--recipe` and `--list`.

A recipe is a function without arguments that returns a `TrainerConfig`, in a
module of `pippin.train.recipes` or in any file given to `load_file`:

    @recipe
    def my_model() -> TrainerConfig:
        '''A first line that --list shows.'''

Its docstring says what it trains, its source, the hardware it is for, the
figure to expect, and the time it takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from pippin.core.config import nearest
from pippin.core.errors import ConfigError
from pippin.train import recipes
from pippin.train.trainer_config import TrainerConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named way to make a trainer config."""

    name: str
    doc: str
    make: Callable[[], TrainerConfig]

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]


_RECIPES: dict[str, Recipe] = {}  # name -> Recipe


def recipe(make: Callable[[], TrainerConfig]) -> Callable[[], TrainerConfig]:
    """Registers a function under its own name.

    Raises:
        ConfigError: another module has a recipe of that name, or the function has no docstring.
    """
    name, doc = make.__name__, (make.__doc__ or "").strip()
    other = _RECIPES.get(name)
    if other is not None and other.make.__module__ != make.__module__:
        raise ConfigError(
            f"two recipes are named {name}: in {other.make.__module__} and {make.__module__}. Rename one."
        )
    if not doc:
        raise ConfigError(f"recipe {name} has no docstring. Say in it what it trains, for --list.")
    _RECIPES[name] = Recipe(name, doc, make)
    return make


def all_recipes() -> dict[str, Recipe]:
    """Every recipe by name, in order, with those of `pippin.train.recipes`."""
    for module in pkgutil.iter_modules(recipes.__path__):
        if not module.name.endswith("_test"):
            importlib.import_module(f"{recipes.__name__}.{module.name}")
    return dict(sorted(_RECIPES.items()))


def get(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ConfigError: there is none; the error names the nearest.
    """
    known = all_recipes()
    if name not in known:
        raise ConfigError(
            f"there is no recipe {name!r}{nearest(name, list(known))}. --list shows all of them."
        )
    return known[name]


def load_file(path: Path) -> list[str]:
    """Runs a Python file of a user's recipes; the names of those in it, without those of modules that it imports.

    Raises:
        ConfigError: there is no such file, or it registers no recipe.
    """
    if not path.is_file():
        raise ConfigError(f"--recipe-file got {path}, which is no file. Give it a .py file with an @recipe.")
    name = f"pippin_recipe_file_{path.stem}"  # a file named json.py must not hide the library's module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    added = sorted(r.name for r in _RECIPES.values() if r.make.__module__ == name)
    if not added:
        raise ConfigError(
            f"{path} registers no recipe. Put @recipe from pippin.train.recipe over a function in it."
        )
    return added
