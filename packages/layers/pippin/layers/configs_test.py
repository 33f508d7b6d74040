"""The configs: all in one place, and without JAX."""

import enum
import importlib
import pkgutil
import subprocess
import sys

import pytest

from pippin import layers
from pippin.core.component import from_text, to_text
from pippin.core.config import Config, registry
from pippin.layers import configs


def _declared() -> dict[str, type]:
    """The config classes and enums of every config module of the package."""
    found = pkgutil.walk_packages(layers.__path__, "pippin.layers.")
    modules = [importlib.import_module(m.name) for m in found if m.name.endswith("_config")]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, (Config, enum.Enum))
        and value.__module__ == module.__name__
    }


def test_every_config_is_exported():
    declared = _declared()
    others = {"fake_quantized", "lora", "multi_lora", "paged", "quantize_matmuls", "PAGED_KERNELS"}
    assert sorted({*declared, *others}) == sorted(configs.__all__)
    assert all(getattr(configs, name) is value for name, value in declared.items())


def test_configs_import_no_array_library():
    program = (
        "import sys, pippin.layers.configs; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [n for n in configs.__all__ if n.endswith("Config")])
def test_every_config_has_an_implementation_that_names_it_and_survives_its_textproto(name):
    kind = getattr(configs, name)
    assert registry()[kind.TYPE] is kind
    if kind.PROVIDES:
        assert kind.implementation().Config is kind
    assert from_text(to_text(kind())) == kind()
