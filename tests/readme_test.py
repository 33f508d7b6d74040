"""The launch commands of the READMEs, with the recipe of one's own that they show: each makes a config."""

import re
import shlex
from pathlib import Path

import pytest

from pippin.train.launch import main

_ROOT = Path(__file__).parents[1]
_PAGES = ("README.md", "packages/train/README.md")
_COMMAND = re.compile(
    r"^ {4}(?:\./bazelw run //packages/train:launch|pippin-train)(?: --(?= ))?( .*)?$", re.MULTILINE
)


def _commands(page: str) -> list[str]:
    return [
        (arguments or "").partition(" #")[0].strip()
        for arguments in _COMMAND.findall((_ROOT / page).read_text())
    ]


def _recipe(page: str) -> str:
    """The Python of the page that has an @recipe."""
    text = (_ROOT / page).read_text()
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = [
        re.sub(r"^ {4}", "", b, flags=re.MULTILINE)
        for b in re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.MULTILINE)
    ]
    return next(block for block in [*fenced, *indented] if "@recipe" in block)


@pytest.mark.parametrize(("page", "command"), [(page, c) for page in _PAGES for c in _commands(page)])
def test_a_command_of_the_readme_makes_a_config(
    page: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(_recipe(page))
    arguments = shlex.split(command)
    only_says = {"--list", "--print-config", "--explain"} & set(arguments)
    assert main([*arguments, *([] if only_says - {"--explain"} else ["--print-config"])]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", _PAGES)
def test_a_page_has_commands(page: str) -> None:
    assert len(_commands(page)) >= 5
