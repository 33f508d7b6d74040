"""The registry of type names."""

import subprocess
import sys

import pytest

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.core.registry import component_name, import_configs, lookup, providers, registry


def test_a_type_is_found_by_its_full_name_and_by_its_last_part():
    class SpoonConfig(Config):
        pass

    assert SpoonConfig.TYPE in registry()
    assert lookup(SpoonConfig.TYPE) is SpoonConfig
    assert lookup(component_name(SpoonConfig)) is SpoonConfig
    assert lookup("MeshConfig") is lookup("pippin.core.Mesh")


def test_a_name_that_two_packages_use_must_be_written_in_full():
    class ForkConfig(Config):
        pass

    twin = type("ForkConfig", (Config,), {"__module__": "elsewhere.knives", "__qualname__": "ForkConfig"})
    assert twin.TYPE == "elsewhere.knives.Fork"  # type: ignore[attr-defined]
    assert lookup("elsewhere.knives.Fork") is twin
    twins = {name for name in registry() if name.endswith(".Fork")}
    if len(twins) > 1:  # the name of a class inside a function has the function's in front
        with pytest.raises(ConfigError, match="is ambiguous. Write one of"):
            lookup("Fork")


def test_an_unknown_type_names_the_nearest_and_the_remedy():
    with pytest.raises(
        ConfigError, match=r"no component type 'Mehs' \(did you mean 'Mesh'\?\)\. Choose a registered type"
    ):
        lookup("Mehs")
    with pytest.raises(
        ConfigError, match=r"no component type 'os\.Thing'.*import the module that declares its config"
    ):
        lookup("os.Thing")


def test_providers_are_the_components_of_an_interface():
    import_configs()
    assert "pippin.core.Checkpointer" in providers("checkpointer")
    assert providers("no_such_interface") == []


def test_a_type_of_pippin_is_found_before_anything_was_imported():
    program = """
import sys
from pippin.core.registry import lookup
print(lookup("pippin.core.Mesh").__name__, lookup("Mesh").__name__, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["MeshConfig", "MeshConfig", "False"]
