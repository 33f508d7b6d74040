from pathlib import Path

import pytest

from pippin.core.command_line import run_command
from pippin.core.errors import ConfigError


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("x is 3; it must be even. Give 4."), 2, "error: x is 3; it must be even. Give 4.\n"),
        (
            PermissionError(13, "Permission denied", "d"),
            2,
            "Permission denied: 'd'. Check the path, the permissions",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_mistakes_are_told_in_a_line(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: _raise(error)) == code
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


def test_a_defect_is_shown_as_such() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_paths_are_those_of_where_the_user_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    assert run_command(lambda: 7 if Path.cwd() == tmp_path else 0) == 7
