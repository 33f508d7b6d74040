"""The golden files: each recipe's whole config as a textproto, so that no change of a default goes unseen.

`bazel run //tests/golden:update` writes them anew.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from pippin.core.component import to_text
from pippin.train.recipe import all_recipes

_FOLDER = "tests/golden/recipes"
HEADER = "# proto-file: pippin/v1/component.proto\n# proto-message: Component\n"


def texts() -> dict[str, str]:
    """What each recipe's golden file should hold, by file name."""
    return {f"{name}.textproto": HEADER + to_text(entry.make()) for name, entry in all_recipes().items()}


def difference(name: str, golden: str, now: str) -> str:
    """A unified diff from the golden file to the recipe as it is now; empty if they are equal."""
    lines = difflib.unified_diff(
        golden.splitlines(), now.splitlines(), f"golden/{name}", f"{name} as it is now", lineterm="", n=8
    )
    return "\n".join(lines)


def update(folder: Path) -> list[str]:
    """Writes the golden files of all recipes and removes those of no recipe; the names of what changed."""
    changed = []
    wanted = texts()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(name)
    for path in folder.glob("*.textproto"):
        if path.name not in wanted:
            path.unlink()
            changed.append(path.name)
    return changed


def main() -> None:
    """Updates the files of the workspace."""
    changed = update(Path(os.environ["BUILD_WORKSPACE_DIRECTORY"], _FOLDER))
    print("\n".join(changed) or "all golden files are up to date")


if __name__ == "__main__":
    main()
