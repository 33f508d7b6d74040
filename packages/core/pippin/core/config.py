"""Configs: frozen, typed, nested descriptions of components, which need no JAX.

A config class is declared by subclassing `Config`; the subclass becomes a
keyword-only frozen dataclass and is registered under its type name:

    class FeedForwardConfig(
        Config, implementation="pippin.layers.feed_forward:FeedForward", provides="feed_forward"
    ):
        input_dim: Required[int] = REQUIRED
        hidden_dim: Required[int] = REQUIRED
        proj: Annotated[Config, Slot("linear")] = LinearConfig()

`provides` names the interface (proto/pippin/v1/interfaces) of what the config
builds, and `Slot` the interface that a field takes. `implementation` is where
the built class lies; it is imported by `build()`, so that a config tree is made,
changed and printed without importing what it describes. A class that lies
beside its own config (in a user's module, say) needs no `implementation`: see
`Configurable`.

Source: the composition of configs of AXLearn, arXiv:2507.05411, section 4.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

from pippin.core.config_field import (
    REQUIRED,
    Node,
    Required,
    RequiredType,
    Slot,
    check_value,
    field_hints,
    size_fields,
    union_members,
)
from pippin.core.errors import ConfigError
from pippin.core.registry import lookup, nearest, providers, register, registry, short_name, type_name

__all__ = [
    "REQUIRED",
    "Config",
    "Configurable",
    "Required",
    "RequiredType",
    "Slot",
    "check_value",
    "children",
    "field_hints",
    "lookup",
    "nearest",
    "providers",
    "registry",
    "require_field",
    "union_members",
]

# Not typing.Self: the checks of annotations in tests decorate methods, not classes, and refuse it there.
# ruff: noqa: PYI019
_C = TypeVar("_C", bound="Config")


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config(Node):
    """The base of all configs. Subclasses declare fields; see the module.

    A field holds a bool, int, float, str, member of a `StrEnum`, config, None
    where its annotation allows it, or a tuple of these. Values are checked
    against the annotations when the config is made.
    """

    _implementation: ClassVar[Any] = None

    if TYPE_CHECKING:
        # A slot holds whatever provides its interface, and only who chose that knows its fields.
        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(
        cls, *, implementation: str = "", provides: str | None = None, version: int = 1, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        _check_declaration(cls, implementation)
        # Without __init__, whose place is taken below: it would let every value through.
        dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False)(cls)
        cls._implementation = implementation or None
        cls.VERSION = version
        if provides is not None:
            cls.PROVIDES = provides
        cls.TYPE = type_name(cls)
        register(cls)

    def __init__(self, *args: Any, **fields: Any) -> None:
        cls = type(self)
        if args or cls is Config:
            raise ConfigError(
                f"{short_name(cls)} got {len(args)} values without a name. Write field=value for each."
                if args
                else "Config itself describes nothing. Make a config of a class that derives from it."
            )
        for name in fields:
            require_field(cls, name)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name, hint in field_hints(cls).items():
            value = check_value(f"{short_name(cls)}.{name}", fields.get(name, defaults[name]), hint)
            if name in size_fields(cls) and isinstance(value, int) and value < 1:
                raise ConfigError(
                    f"{short_name(cls)}.{name} is {value}. Set it to 1 or more: it is the size of a dim."
                )
            object.__setattr__(self, name, value)
        # What the caller chose, as against defaults: `replace` must not overwrite it.
        object.__setattr__(self, "_chosen", frozenset(fields))
        # Survives `set`, so that an error can name the path of a template that its parent filled in.
        object.__setattr__(self, "_identity", object())
        self.validate()

    def validate(self) -> None:
        """Raises `ConfigError` where fields do not fit each other. Fields may still be REQUIRED."""

    def set(self: _C, **fields: Any) -> _C:
        """A copy with other values for some fields.

        Raises:
            ConfigError: there is no field of that name, or its type does not allow the value.
        """
        for name in fields:
            require_field(type(self), name)
        new = dataclasses.replace(self, **fields)  # type: ignore[type-var]
        object.__setattr__(new, "_chosen", self.chosen.union(fields))
        object.__setattr__(new, "_identity", self._identity)
        return new

    @property
    def chosen(self) -> frozenset[str]:
        """The names of the fields that were given a value, rather than left at their default."""
        return self._chosen

    def build(self, **kwargs: Any) -> Any:
        """The component that this config describes.

        Args:
            **kwargs: what the component's constructor takes beside the config, such as `rngs`.

        Raises:
            ConfigError: a required field is not set; the error names its full path.
        """
        for name in field_hints(type(self)):
            if getattr(self, name) is REQUIRED:
                raise UnsetError(((self, name),))
        try:
            return self.implementation()(self, **kwargs)
        except UnsetError as e:
            raise e.under(self) from None

    @classmethod
    def implementation(cls) -> type:
        """The class that `build` instantiates, imported now if it was not yet.

        Raises:
            ConfigError: there is none.
        """
        if cls._implementation is None:
            raise ConfigError(
                f"{cls.TYPE} describes no component by itself: it has no implementation. Use a config that "
                f"derives from it, or declare the class with implementation='module:Class'."
            )
        if not isinstance(cls._implementation, str):
            return cls._implementation
        module, _, name = cls._implementation.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as e:
            if e.name is None or not f"{module}.".startswith(f"{e.name}."):
                raise  # a module that the implementation imports
            missing = f"there is no module {e.name}"
        except AttributeError:
            missing = f"{module} has no {name}"
        raise ConfigError(
            f"{cls.TYPE} is implemented by {cls._implementation!r}, but {missing}. Install the package that holds "
            f"it, or mend the name where {short_name(cls)} is declared."
        )

    def __repr__(self) -> str:
        # Only what differs from the defaults: a whole tree is printed by `config_text`.
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{short_name(type(self))}({', '.join(shown)})"


class Configurable:
    """A class that is built from its nested `Config`, and is that config's implementation."""

    Config: ClassVar[type[Config]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        if config is None:
            return
        here = f"{cls.__module__}:{cls.__qualname__}"
        if config._implementation is None:
            config._implementation = cls
        elif config._implementation not in (here, cls):
            raise ConfigError(
                f"{here} has {short_name(config)} as its Config, which builds {config._implementation} instead. Declare "
                "a config of its own for it, which may derive from that one."
            )


class UnsetError(ConfigError):
    """A required field that is not set; `under` adds to its path as the error leaves each build."""

    def __init__(self, trail: tuple[tuple[Config, str], ...]):
        # Each config that was being built, from the outermost on, with the path from it to the next one.
        self.trail = trail
        top, (leaf, name) = trail[0][0], trail[-1]
        path = ".".join(step for _, step in trail)
        super().__init__(
            f"{path} of {short_name(type(top))} is required and was not set: {short_name(type(leaf))} cannot be built "
            f"without it. Set it, for example with override(cfg, {{{path!r}: ...}}), or let the parent of "
            f"{short_name(type(leaf))} set {name}."
        )

    def under(self, parent: Config) -> UnsetError:
        if parent is self.trail[0][0]:
            return self
        paths = _paths(parent)
        # A parent may build a config that it made itself: then one further in is what stands in the tree.
        for i, (cfg, _) in enumerate(self.trail):
            if cfg._identity in paths:
                return UnsetError(((parent, paths[cfg._identity]), *self.trail[i:]))
        return UnsetError(((parent, f"({short_name(type(self.trail[0][0]))})"), *self.trail))


def _paths(cfg: Config) -> dict[object, str]:
    """The path of each config below a config, by its identity; where it stands twice, the first."""
    found: dict[object, str] = {}
    for step, child in children(cfg):
        found.setdefault(child._identity, step)
        for identity, path in _paths(child).items():
            found.setdefault(identity, f"{step}.{path}")
    return found


def _check_declaration(cls: type[Config], implementation: str) -> None:
    """Raises where a class's body would be misunderstood, before it becomes a dataclass."""
    where = f"{cls.__module__}.{cls.__qualname__}"
    annotations = inspect.get_annotations(cls)
    for name, hint in annotations.items():
        if "ClassVar" in str(hint):
            continue
        if name in _RESERVED or name.startswith("_"):
            raise ConfigError(f"{where} has a field {name!r}, a name that configs use themselves. Rename it.")
        if name not in cls.__dict__:
            raise ConfigError(
                f"{where}.{name} has no default. Give it one, or write `{name}: Required[...] = REQUIRED`."
            )
        if isinstance(cls.__dict__[name], list | dict | set | dataclasses.Field):
            raise ConfigError(
                f"{where}.{name} has the default {cls.__dict__[name]!r}, which can change. Give it a plain value; "
                "several are a tuple."
            )
    for name, value in cls.__dict__.items():
        data = isinstance(value, bool | int | float | str | tuple | list | dict | Node) or value is REQUIRED
        if data and name not in annotations and not name.startswith("__"):
            raise ConfigError(
                f"{where} sets {name} without an annotation, so it is no field. Write `{name}: type = {value!r}`, "
                "the type as in the class that it derives from if that has the field."
            )
    if implementation and not re.fullmatch(r"[\w.]+:\w+", implementation):
        raise ConfigError(
            f"{where} has implementation={implementation!r}. Write it as 'package.module:Class'."
        )


_RESERVED = frozenset([*vars(Config), *vars(Node)])


def children(cfg: Config) -> Iterator[tuple[str, Config]]:
    """The configs directly inside a config, each with its step: a field's name, or `name.index`."""
    for name in field_hints(type(cfg)):
        value = getattr(cfg, name)
        if isinstance(value, Config):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Config))


def require_field(cls: type[Config], name: str, prefix: str = "") -> None:
    """Raises `ConfigError` naming the nearest field, unless a config class has a field `name`."""
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if name not in names:
        raise ConfigError(
            f"{short_name(cls)} has no field {prefix + name!r}{nearest(name, names)}. "
            f"Its fields are {', '.join(names) or 'none'}."
        )
