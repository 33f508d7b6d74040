"""Each wheel works alone, with nothing but what it declares, and holds all that it should."""

import importlib.resources
import os
import pathlib
import subprocess
import zipfile

import pytest
from clean_environment import CleanEnvironment

RUNFILES = pathlib.Path(os.environ["RUNFILES_DIR"], "pippin_repo")
FOLDERS = {
    "pippin-proto": "proto",
    "pippin-core": "packages/core",
    "pippin-layers": "packages/layers",
    "pippin-train": "packages/train",
    "pippin-serve": "packages/serve",
    "pippin-export": "packages/export",
}
SCRIPTS = {
    "pippin-export": {
        "pippin-compress": "packages/export/pippin/export/compress/command",
        "pippin-coreai": "packages/export/pippin/export/coreai",
        "pippin-coreml": "packages/export/pippin/export/coreml",
        "pippin-export-adapter": "packages/export/pippin/export/adapter",
        "pippin-gguf": "packages/export/pippin/export/gguf",
        "pippin-huggingface": "packages/export/pippin/export/huggingface",
        "pippin-latency": "packages/export/pippin/export/latency/command",
        "pippin-verify": "packages/export/pippin/export/verify",
    },
    "pippin-layers": {
        "pippin-convert": "packages/layers/pippin/layers/convert",
        "pippin-fetch": "packages/layers/pippin/layers/fetch",
    },
    "pippin-serve": {
        "pippin-client": "packages/serve/pippin/serve/client",
        "pippin-manifests": "packages/serve/pippin/serve/manifests",
        "pippin-serve": "packages/serve/pippin/serve/server",
    },
    "pippin-train": {
        "pippin-train": "packages/train/pippin/train/launch",
        "pippin-compile": "packages/train/pippin/train/compile",
        "pippin-jobs": "packages/train/pippin/train/jobs",
    },
}

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def wheel(name: str) -> pathlib.Path:
    (found,) = (RUNFILES / FOLDERS[name] / "wheel").glob("*.whl")
    return found


def contents(name: str) -> list[str]:
    return [path for path in zipfile.ZipFile(wheel(name)).namelist() if ".dist-info/" not in path]


def modules(name: str) -> list[str]:
    paths = [
        path.removesuffix(".py").removesuffix("/__init__") for path in contents(name) if path.endswith(".py")
    ]
    return [path.replace("/", ".") for path in paths]


@pytest.fixture(scope="module", params=FOLDERS)
def installed(request, tmp_path_factory):
    """A wheel's name and the clean environment that it is in."""
    ours = {name: wheel(name) for name in FOLDERS}
    folder = tmp_path_factory.mktemp("environment")
    return request.param, CleanEnvironment(folder, wheel(request.param), ours)


def test_every_module_imports(installed):
    name, environment = installed
    done = environment.run(environment.python, "-I", "-c", IMPORT_ALL, *modules(name))
    assert done.returncode == 0, done.stderr


def test_nothing_undeclared_can_be_imported(installed):
    name, environment = installed
    for undeclared in ["pytest", *([] if name == "pippin-train" else ["seqio", "tensorflow"])]:
        done = environment.run(environment.python, "-I", "-c", f"import {undeclared}")
        assert f"No module named '{undeclared}'" in done.stderr


def test_package_data_is_installed(installed):
    _, environment = installed
    program = (
        "import importlib.resources\n"
        "for path in (importlib.resources.files('pippin.v1') / 'interfaces').iterdir():\n"
        "    print(path.name)"
    )
    done = environment.run(environment.python, "-I", "-c", program)
    here = importlib.resources.files("pippin.v1") / "interfaces"
    assert sorted(done.stdout.split()) == sorted(path.name for path in here.iterdir())


def test_console_script_does_what_the_bazel_target_does(installed):
    name, environment = installed
    if name not in SCRIPTS:
        assert not (environment.bin / name).exists()
        return
    for script, target in SCRIPTS[name].items():
        installed_help = environment.run(environment.bin / script, "--help")
        bazel_help = subprocess.run(
            [RUNFILES / target, "--help"], capture_output=True, text=True, check=False
        )
        assert installed_help.returncode == 0, installed_help.stderr
        assert bazel_help.returncode == 0, bazel_help.stderr
        assert installed_help.stdout == bazel_help.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_holds_no_tests_and_is_typed(name):
    paths = contents(name)
    assert not [path for path in paths if path.endswith("_test.py")]
    assert "pippin/__init__.py" not in paths
    assert [path for path in paths if path.endswith("/py.typed")]
