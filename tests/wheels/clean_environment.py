"""A virtual environment with one wheel and what it declares, and nothing else.

Other distributions come from the environment that runs this, as links, so no network is needed.
"""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from uv import find_uv_bin


def distribution_name(name: str) -> str:
    """A distribution's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required_by(wheel: pathlib.Path) -> list[Requirement]:
    """What a wheel's metadata declares, extras aside."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        declared = Metadata.from_email(archive.read(name), validate=False).requires_dist or []
    return [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]


class CleanEnvironment:
    """`python` imports the wheel, the wheels of ours that it declares, and the closure of its other needs."""

    def __init__(self, folder: pathlib.Path, wheel: pathlib.Path, ours: dict[str, pathlib.Path]):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin/python"
        self.bin = folder / "bin"
        wheels, needed = {}, {}
        self._collect([wheel], ours, wheels, needed)
        self._install(list(wheels))
        (site,) = folder.glob("lib/python3.*/site-packages")
        _link(needed.values(), site)

    def run(self, *command: str | os.PathLike) -> subprocess.CompletedProcess:
        """Runs a command that sees only this environment."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "RUNFILES"))
        }
        return subprocess.run(command, env=kept, capture_output=True, text=True, check=False)

    def _collect(self, queue, ours, wheels, needed) -> None:
        """Fills `wheels` (an ordered set) and `needed`, name -> installed distribution."""
        for wheel in queue:
            wheels[wheel] = None
            for requirement in required_by(wheel):
                name = distribution_name(requirement.name)
                if name in ours:
                    self._collect([ours[name]], ours, wheels, needed)
                else:
                    _closure(requirement, needed, set())

    def _install(self, wheels: list[pathlib.Path]) -> None:
        command = [
            find_uv_bin(),
            "pip",
            "install",
            "--offline",
            "--no-index",
            "--no-deps",
            "--no-cache",
            "--quiet",
        ]
        subprocess.run([*command, "--python", self.python, *wheels], check=True)


def _closure(requirement: Requirement, needed: dict, seen: set) -> None:
    """Adds to `needed` what a requirement brings, by the metadata of what is installed here."""
    name = distribution_name(requirement.name)
    for extra in ["", *sorted(requirement.extras)]:
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        needed[name] = importlib.metadata.distribution(name)
        for text in needed[name].requires or ():
            further = Requirement(text)
            if further.marker is None or further.marker.evaluate({"extra": extra}):
                _closure(further, needed, seen)


def _link(distributions: Iterable[importlib.metadata.Distribution], site: pathlib.Path) -> None:
    """Links the files of distributions into a site-packages folder: whole folders where all in it is theirs."""
    wanted = {path for d in distributions for path in _files(d)}
    foreign = {path for d in importlib.metadata.distributions(path=[_SITE]) for path in _files(d)} - wanted
    shared = {parent for path in foreign for parent in path.parents}
    for path in wanted:
        top = next(p for p in [*reversed(path.parents), path] if p not in shared and p != pathlib.PurePath())
        link = site / top
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(pathlib.Path(_SITE, top))


def _files(distribution: importlib.metadata.Distribution) -> Iterable[pathlib.PurePath]:
    return (pathlib.PurePath(path) for path in distribution.files or () if ".." not in path.parts)


_SITE = next(path for path in sys.path if path.endswith("site-packages"))
