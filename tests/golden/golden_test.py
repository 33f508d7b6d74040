import re
from pathlib import Path

import pytest

from pippin.core.component import from_text
from pippin.train.recipe import get
from tests.golden import golden

_FOLDER = Path(__file__).parent / "recipes"


@pytest.mark.parametrize("name", sorted(golden.texts()))
def test_a_recipe_is_what_its_golden_file_says(name: str) -> None:
    path = _FOLDER / name
    assert path.exists(), f"{name} has no golden file. Make it: bazel run //tests/golden:update"
    found = golden.difference(name, path.read_text(), golden.texts()[name])
    assert not found, f"the recipe changed. If it was meant to: bazel run //tests/golden:update\n{found}"


def test_no_golden_file_is_left_of_a_recipe_that_is_gone() -> None:
    assert {p.name for p in _FOLDER.glob("*.textproto")} == set(golden.texts())


def test_a_golden_file_is_the_config_itself() -> None:
    text = (_FOLDER / "stdlib_tiny.textproto").read_text()
    assert from_text(text) == get("stdlib_tiny").make()


def test_a_changed_default_is_shown_as_a_difference(tmp_path: Path) -> None:
    golden.update(tmp_path)
    path = tmp_path / "stdlib_tiny.textproto"
    path.write_text(path.read_text().replace("int_value: 192", "int_value: 191"))
    found = golden.difference(path.name, path.read_text(), golden.texts()[path.name])
    assert re.search(r"^-\s+int_value: 191$", found, re.MULTILINE) and re.search(
        r"^\+\s+int_value: 192$", found, re.MULTILINE
    )
    assert golden.update(tmp_path) == [path.name]
    assert golden.update(tmp_path) == []
