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
import difflib
import enum
import functools
import importlib
import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar, dataclass_transform

from pippin.core.errors import ConfigError


class RequiredType(enum.Enum):
    """The type of `REQUIRED`."""

    REQUIRED = "REQUIRED"

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = RequiredType.REQUIRED

_T = TypeVar("_T")
# Not typing.Self: the checks of annotations in tests decorate methods, not classes, and refuse it there.
_C = TypeVar("_C", bound="Config")

if typing.TYPE_CHECKING:
    Required = typing.Annotated[_T, REQUIRED]
else:

    class Required:
        """`Required[int]` annotates a field whose default is `REQUIRED`."""

        def __class_getitem__(cls, item):
            return typing.Union[item, RequiredType]  # noqa: UP007  `item` may be a string


@dataclasses.dataclass(frozen=True)
class Slot:
    """Annotates a field that takes any component that provides an interface."""

    interface: str


Scalar = bool | int | float | str | enum.StrEnum | None

_REGISTRY: dict[str, type[Config]] = {}  # type name -> config class


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """The base of all configs. Subclasses declare fields; see the module.

    A field holds a bool, int, float, str, member of a `StrEnum`, config, None
    where its annotation allows it, or a tuple of these. Values are checked
    against the annotations when the config is made.
    """

    TYPE: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    PROVIDES: ClassVar[str] = ""
    _implementation: ClassVar[Any] = None

    def __init_subclass__(
        cls, *, implementation: str = "", provides: str | None = None, version: int = 1, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
        cls._implementation = implementation or None
        cls.VERSION = version
        if provides is not None:
            cls.PROVIDES = provides
        cls.TYPE = _type_name(cls)
        other = _REGISTRY.get(cls.TYPE)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} would be registered as {cls.TYPE}, which is the type "
                f"name of {other.__module__}.{other.__qualname__}. Type names are unique in a package: "
                "rename one of the two."
            )
        _REGISTRY[cls.TYPE] = cls

    def __new__(cls: type[_C], **kwargs: Any) -> _C:
        self = super().__new__(cls)
        # What the caller chose, as against defaults: `replace` must not overwrite it.
        object.__setattr__(self, "_chosen", frozenset(kwargs))
        # Survives `set`, so that an error can name the path of a template that its parent filled in.
        object.__setattr__(self, "_identity", object())
        return self

    def __init__(self, **kwargs: Any) -> None:
        if kwargs:
            raise TypeError(f"{type(self).__name__} has no fields, got {sorted(kwargs)}")

    def __post_init__(self) -> None:
        for name, hint in field_hints(type(self)).items():
            check_value(f"{type(self).__name__}.{name}", getattr(self, name), hint)
        self.validate()

    def validate(self) -> None:
        """Raises `ConfigError` where fields do not fit each other. Fields may still be REQUIRED."""

    def set(self: _C, **fields: Any) -> _C:
        """A copy with other values for some fields.

        Raises:
            ConfigError: there is no field of that name, or its type does not allow the value.
        """
        for name in fields:
            require_field(self, name)
        new = dataclasses.replace(self, **fields)  # type: ignore[type-var]
        object.__setattr__(new, "_chosen", self.chosen.union(fields))
        object.__setattr__(new, "_identity", self._identity)
        return new

    @property
    def chosen(self) -> frozenset[str]:
        """The names of the fields that were given a value, rather than left at their default."""
        return self._chosen  # type: ignore[attr-defined]

    def build(self, **kwargs: Any) -> Any:
        """The component that this config describes.

        Args:
            **kwargs: what the component's constructor takes beside the config, such as `rngs`.

        Raises:
            ConfigError: a required field is not set; the error names its full path.
        """
        for name in field_hints(type(self)):
            if getattr(self, name) is REQUIRED:
                raise _UnsetError(self, name)
        try:
            return self.implementation()(self, **kwargs)
        except _UnsetError as e:
            raise e.under(self) from None

    @classmethod
    def implementation(cls) -> type:
        """The class that `build` instantiates, imported now if it was not yet."""
        if isinstance(cls._implementation, str):
            module, _, name = cls._implementation.partition(":")
            return getattr(importlib.import_module(module), name)
        if cls._implementation is None:
            raise ConfigError(
                f"{cls.TYPE} describes no component by itself: it has no implementation. Use a config that "
                f"derives from it, or declare the class with implementation='module:Class'."
            )
        return cls._implementation

    def __repr__(self) -> str:
        # Only what differs from the defaults: a whole tree is printed by `pippin.core.config_text`.
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


class Configurable:
    """A class that is built from its nested `Config`, and is that config's implementation."""

    Config: ClassVar[type[Config]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        if config is not None and config._implementation is None:
            config._implementation = cls


class _UnsetError(ConfigError):
    """A required field that is not set; `under` adds the path as the error leaves each build."""

    def __init__(self, cfg: Config, path: str, leaf: Config | None = None):
        self.cfg, self.path, self.leaf = cfg, path, leaf or cfg
        name = path.rpartition(".")[2]
        super().__init__(
            f"{path} of {type(cfg).__name__} is required and was not set: {type(self.leaf).__name__} cannot "
            f"be built without it. Set it, for example with override(cfg, {{{path!r}: ...}}), or let the "
            f"parent of {type(self.leaf).__name__} set {name}."
        )

    def under(self, parent: Config) -> _UnsetError:
        for step, child in children(parent):
            if child._identity is self.cfg._identity:  # type: ignore[attr-defined]
                return _UnsetError(parent, f"{step}.{self.path}", self.leaf)
        return (
            self
            if self.cfg is parent
            else _UnsetError(parent, f"({type(self.cfg).__name__}).{self.path}", self.leaf)
        )


def _type_name(cls: type[Config]) -> str:
    package = ".".join(cls.__module__.split(".")[:2])
    name = cls.__qualname__.replace("<locals>.", "")
    return f"{package}.{name.removesuffix('Config').removesuffix('.') or name}"


def registry() -> dict[str, type[Config]]:
    """All config classes by type name, of the modules that were imported."""
    return dict(_REGISTRY)


def lookup(name: str) -> type[Config]:
    """The config class of a type name; its last part is enough where it is unique.

    Raises:
        ConfigError: there is none, or several.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    found = [t for t in sorted(_REGISTRY) if t.rpartition(".")[2] == name]
    if len(found) == 1:
        return _REGISTRY[found[0]]
    if found:
        raise ConfigError(f"component type {name!r} is ambiguous. Write one of {', '.join(found)} in full.")
    short = {t.rpartition(".")[2]: t for t in _REGISTRY}
    raise ConfigError(
        f"there is no component type {name!r}{nearest(name, [*_REGISTRY, *short])}. Import the module that "
        "declares its config, or choose a registered type."
    )


def providers(interface: str) -> list[str]:
    """The type names of the registered components that provide an interface."""
    return sorted(t for t, cls in _REGISTRY.items() if cls.PROVIDES == interface and cls._implementation)


@functools.cache
def field_hints(cls: type[Config]) -> dict[str, Any]:
    """The annotations of a config's fields, in order, with their `Slot`s."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def children(cfg: Config) -> Iterator[tuple[str, Config]]:
    """The configs directly inside a config, each with its step: a field's name, or `name.index`."""
    for name in field_hints(type(cfg)):
        value = getattr(cfg, name)
        if isinstance(value, Config):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Config))


def require_field(cfg: Config, name: str, prefix: str = "") -> None:
    """Raises `ConfigError` naming the nearest field, unless `cfg` has a field `name`."""
    names = list(field_hints(type(cfg)))
    if name not in names:
        raise ConfigError(
            f"{type(cfg).__name__} has no field {prefix + name!r}{nearest(name, names)}. "
            f"Its fields are {', '.join(names) or 'none'}."
        )


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean 'x'?` for the name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def check_value(where: str, value: Any, hint: Any) -> None:
    """Raises `ConfigError` unless an annotation allows a value."""
    problem = _problem(value, hint)
    if problem:
        raise ConfigError(f"{where} got {problem}")


def union_members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union annotation; the annotation itself where it is not a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _problem(value: Any, hint: Any) -> str:
    """Why a value does not fit an annotation: what was got and what is allowed. Empty if it fits."""
    members = union_members(hint)
    if len(members) > 1:
        problems = [_problem(value, member) for member in members]
        if not all(problems):
            return ""
        # Of a slot that may be None, only the slot's problem says anything.
        slots = [
            p for p, m in zip(problems, members, strict=True) if typing.get_origin(m) is typing.Annotated
        ]
        return slots[0] if slots else f"{value!r}, which is not {_describe(hint)}. Give it {_describe(hint)}."
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        base, *marks = typing.get_args(hint)
        slots = [m for m in marks if isinstance(m, Slot)]
        return _slot_problem(value, slots[0]) if slots else _problem(value, base)
    if origin is tuple:
        if not isinstance(value, tuple):
            return f"{value!r}, which is not a tuple. Write ({value!r},) for a tuple of one."
        item_hint = typing.get_args(hint)[0]
        return next((f"at [{i}] {p}" for i, item in enumerate(value) if (p := _problem(item, item_hint))), "")
    if hint is type(None) and value is None or hint is Any:
        return ""
    fits = isinstance(value, (int, float) if hint is float else hint)
    if isinstance(value, bool) and hint in (int, float):
        fits = False
    return "" if fits else f"{value!r}, which is not {_describe(hint)}. Give it {_describe(hint)}."


def _slot_problem(value: Any, slot: Slot) -> str:
    if isinstance(value, Config) and slot.interface == value.PROVIDES:
        return ""
    what = f"a {type(value).__name__}" if isinstance(value, Config) else repr(value)
    does = (
        f"provides {value.PROVIDES!r}"
        if isinstance(value, Config) and value.PROVIDES
        else "provides no interface"
    )
    offer = ", ".join(providers(slot.interface)) or "none is registered"
    return (
        f"{what}, which {does}; the slot takes a component that provides {slot.interface!r}. "
        f"Registered components that do: {offer}."
    )


def _describe(hint: Any) -> str:
    members = union_members(hint)
    if len(members) > 1:
        return " or ".join(_describe(m) for m in members if m is not RequiredType)
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(repr(m.value) for m in hint)}"
    if isinstance(hint, type):
        return f"{'an' if hint.__name__[0] in 'aeiouAEIOU' else 'a'} {hint.__name__}"
    return str(hint)
