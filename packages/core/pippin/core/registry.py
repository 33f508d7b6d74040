"""The registry: config classes by type name, such as `pippin.layers.FeedForward`. No JAX."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from pippin.core.errors import ConfigError

_TYPES: dict[str, type[Any]] = {}  # type name -> config class


def type_name(cls: type[Any]) -> str:
    """The package that a class lies in (two parts at most), and its name less `Config`."""
    package = ".".join(cls.__module__.split(".")[:2])
    name = cls.__qualname__.replace("<locals>.", "")
    return f"{package}.{name.removesuffix('Config').removesuffix('.') or name}"


def short_name(cls: type[Any]) -> str:
    """A class's name in a message: with that of the class around it, as there are many that are named Config."""
    return cls.__qualname__.rpartition("<locals>.")[2]


def component_name(cls: type[Any]) -> str:
    """What a user calls the component of a config class: its `TYPE`, without the package."""
    return cls.TYPE.rpartition(".")[2]


def register(cls: type[Any]) -> None:
    """Adds a config class under its `TYPE`. A class that is declared again replaces itself.

    Raises:
        ConfigError: another class has the name.
    """
    other = _TYPES.get(cls.TYPE, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            f"{cls.__module__}.{cls.__qualname__} would be registered as {cls.TYPE}, which is the type "
            f"name of {other.__module__}.{other.__qualname__}. Type names are unique in a package: "
            "rename one of the two."
        )
    _TYPES[cls.TYPE] = cls


def registry() -> dict[str, type[Any]]:
    """All config classes by type name, of the modules that were imported."""
    return dict(_TYPES)


def import_configs() -> list[str]:
    """Imports every module of pippin's packages that declares configs: `config.py` and `*_config.py`.

    Returns:
        The names of the modules.
    """
    pippin = importlib.import_module("pippin")
    found = []
    for module in pkgutil.walk_packages(pippin.__path__, "pippin."):
        last = module.name.rpartition(".")[2]
        if not module.ispkg and (last == "config" or last.endswith("_config")):
            importlib.import_module(module.name)
            found.append(module.name)
    return found


def lookup(name: str) -> type[Any]:
    """The config class of a type name; its last part, or the class's name, is enough where it is unique.

    Those of pippin's own packages are imported if need be. A module of yours is
    not: a name that stands in a file never makes Python run other code.

    Raises:
        ConfigError: there is none, or several.
    """
    if name not in _TYPES:
        import_configs()
    if name in _TYPES:
        return _TYPES[name]
    found = [t for t in sorted(_TYPES) if t.rpartition(".")[2] in (name, name.removesuffix("Config"))]
    if len(found) == 1:
        return _TYPES[found[0]]
    if found:
        raise ConfigError(f"component type {name!r} is ambiguous. Write one of {', '.join(found)} in full.")
    short = [t.rpartition(".")[2] for t in _TYPES]
    raise ConfigError(
        f"there is no component type {name!r}{nearest(name, [*_TYPES, *short])}. Choose a registered type, or "
        "import the module that declares its config first."
    )


def providers(interface: str) -> list[str]:
    """The type names of the registered components that provide an interface."""
    return sorted(t for t, cls in _TYPES.items() if cls.PROVIDES == interface and cls._implementation)


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
