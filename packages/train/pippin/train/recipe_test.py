import sys
from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import ConfigError
from pippin.train import recipe as recipes


def test_every_recipe_has_a_header_and_a_config() -> None:
    known = recipes.all_recipes()
    assert "stdlib_tiny" in known
    for name, entry in known.items():
        assert name == entry.name and entry.summary.endswith(".")
        for heading in ("Source:", "Hardware:"):
            assert heading in entry.doc, name
        assert "Expect:" in entry.doc or "Time:" in entry.doc, name
        assert entry.make() == entry.make()


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no recipe 'stdlib_tny' .did you mean 'stdlib_tiny'"):
        recipes.get("stdlib_tny")


def test_a_file_of_ones_own_adds_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from pippin.train.recipe import get, recipe\n"
        "@recipe\n"
        "def mine():\n"
        "    'My model.'\n"
        "    return get('stdlib_tiny').make().set(steps=7)\n"
    )
    assert recipes.load_file(path) == ["mine"]
    assert recipes.get("mine").make().steps == 7


def test_what_a_file_imports_is_not_its_own(tmp_path: Path) -> None:
    other = "pippin.train.recipes.stdlib_tiny_recovery"
    sys.modules.pop(other, None)  # as in a process that has not listed the recipes
    path = tmp_path / "recovered.py"
    path.write_text(
        f"from {other} import recovery\n"
        "from pippin.train.recipe import get, recipe\n"
        "@recipe\n"
        "def recovered():\n"
        "    'My model, recovered.'\n"
        "    return recovery(get('stdlib_tiny').make(), 'compressed/mine')\n"
    )
    assert recipes.load_file(path) == ["recovered"]


def test_a_file_without_recipes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="registers no recipe"):
        recipes.load_file(path)
    with pytest.raises(ConfigError, match="is no file"):
        recipes.load_file(tmp_path / "absent.py")


def test_a_recipe_without_a_docstring_or_with_a_taken_name_is_refused() -> None:
    def undocumented() -> Any:
        return None

    with pytest.raises(ConfigError, match="has no docstring"):
        recipes.recipe(undocumented)

    def stdlib_tiny() -> Any:
        """Not the real one."""

    recipes.all_recipes()
    with pytest.raises(ConfigError, match="two recipes are named stdlib_tiny"):
        recipes.recipe(stdlib_tiny)
