"""The linters and formatters of this repository, as commands over its whole working tree."""

import os
import pathlib

from ruff.__main__ import find_ruff_bin

_RUNFILES = pathlib.Path(os.environ["RUNFILES_DIR"])

# The working tree itself, behind the links of the runfiles.
ROOT = (_RUNFILES / "pippin_repo/WORKSPACE").resolve().parent


def commands(fix: bool) -> dict[str, list[str]]:
    """Name -> the command that checks the tree, or with `fix` the one that mends it; run them in ROOT."""
    ruff, buildifier = find_ruff_bin(), str(_RUNFILES / "buildifier/buildifier")
    return {
        "ruff check": [ruff, "check", "--no-cache", "--quiet", *(["--fix"] if fix else [])],
        "ruff format": [ruff, "format", "--no-cache", "--quiet", *([] if fix else ["--diff"])],
        "buildifier": [
            buildifier,
            "-r",
            f"-mode={'fix' if fix else 'diff'}",
            f"-lint={'fix' if fix else 'warn'}",
            ".",
        ],
    }
