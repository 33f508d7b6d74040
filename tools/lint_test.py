"""Every file of the working tree is formatted and free of what the linters know."""

import subprocess

import lint
import pytest

_COMMANDS = lint.commands(fix=False)


@pytest.mark.parametrize("name", _COMMANDS)
def test_finds_nothing(name):
    done = subprocess.run(_COMMANDS[name], cwd=lint.ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and not output, (
        f"{name}: ./bazelw run //tools:format mends most of it\n{output}"
    )
