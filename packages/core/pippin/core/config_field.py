"""What a field of a config may hold: its annotation, and the values that fit the annotation."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from typing import Any, ClassVar, TypeVar

from pippin.core.errors import ConfigError
from pippin.core.registry import nearest, providers, short_name


class RequiredType(enum.Enum):
    """The type of `REQUIRED`."""

    REQUIRED = "REQUIRED"

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = RequiredType.REQUIRED

_T = TypeVar("_T")

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


class Node:
    """What a slot takes: the base of `Config`."""

    TYPE: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    PROVIDES: ClassVar[str] = ""


_SCALARS = {bool: "a bool", int: "an int", float: "a float", str: "a str", type(None): "None"}
_INT_LIMIT = 2**63  # ints are 64 bits wide where a tree is stored


@functools.cache
def field_hints(cls: type[Node]) -> dict[str, Any]:
    """The annotations of a config's fields, in order, with their `Slot`s.

    Raises:
        ConfigError: the class is declared wrongly: an annotation is none that a field may
            have, or the fields are not those that the class's interface asks for.
    """
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as e:
        raise ConfigError(
            f"{short_name(cls)} has an annotation with {e.name!r}, which {cls.__module__} does not define at its top "
            "level. Define or import it there, outside of `if TYPE_CHECKING`."
        ) from None
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, hint in fields.items():
        _check_annotation(f"{short_name(cls)}.{name}", hint)
    if cls.PROVIDES:
        _check_settings(cls, fields)
    return fields


@functools.cache
def size_fields(cls: type[Node]) -> frozenset[str]:
    """The fields that are the size of a dim, says the interface that a config provides."""
    settings = (
        _require_interface(f"{short_name(cls)} provides", cls.PROVIDES).settings if cls.PROVIDES else ()
    )
    return frozenset(s.field for s in settings if s.symbol)


def union_members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union annotation; the annotation itself where it is not a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def item_hint(hint: Any) -> Any:
    """The annotation of the items of a tuple; Any where no tuple is allowed."""
    tuples = (m for m in union_members(hint) if typing.get_origin(m) is tuple)
    return next((typing.get_args(m)[0] for m in tuples), Any)


def slot_of(hint: Any) -> Slot | None:
    """The `Slot` of an annotation that is no union."""
    if typing.get_origin(hint) is not typing.Annotated:
        return None
    return next((mark for mark in hint.__metadata__ if isinstance(mark, Slot)), None)


def enum_of(hint: Any) -> type[enum.StrEnum] | None:
    """The enumeration of an annotation that is one."""
    return hint if isinstance(hint, type) and issubclass(hint, enum.StrEnum) else None


def check_value(where: str, value: Any, hint: Any) -> Any:
    """The value as a field with this annotation holds it: a float where an int was given for one.

    Raises:
        ConfigError: the annotation does not allow the value.
    """
    try:
        return _fitted(value, hint)
    except _MisfitError as e:
        raise ConfigError(f"{where} got {e}") from None


class _MisfitError(Exception):
    """Why a value does not fit: what was got, the rule, and the remedy."""


def _fitted(value: Any, hint: Any) -> Any:
    problem: _MisfitError | None = None
    for member in union_members(hint):
        try:
            fitted = _fitted_to_one(value, member)
        except _MisfitError as e:
            problem = e
        else:
            if fitted is not _OF_ANOTHER_TYPE:
                return fitted
    raise problem or _misfit(value, hint)


_OF_ANOTHER_TYPE = object()


def _fitted_to_one(value: Any, hint: Any) -> Any:
    slot = slot_of(hint)
    if slot is not None:
        _require_provides(value, slot)
        return value
    if typing.get_origin(hint) is typing.Annotated:
        return _fitted(value, hint.__origin__)
    if typing.get_origin(hint) is tuple:
        return _fitted_tuple(value, typing.get_args(hint)[0])
    if hint is float and type(value) is not bool and isinstance(value, (int, float)):
        return _fitted_float(value)
    if hint is int and type(value) is int and not -_INT_LIMIT <= value < _INT_LIMIT:
        raise _MisfitError(f"{_shown(value)}, which needs more than 64 bits. Give it a smaller int.")
    if hint is str and type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _MisfitError(f"{_shown(value)}, which is not valid Unicode. Give it text.") from None
    # Of bool, int and str the very type: a bool is no int here, and a member of an enumeration no str.
    fits = type(value) is hint if hint in _SCALARS else isinstance(value, hint)
    return value if fits else _OF_ANOTHER_TYPE


def _fitted_tuple(value: Any, item_hint: Any) -> tuple[Any, ...]:
    if isinstance(value, list):
        raise _MisfitError(f"{_shown(value)}, which is a list and can change. Write {_shown(tuple(value))}.")
    if not isinstance(value, tuple):
        raise _MisfitError(
            f"{_shown(value)}, which is not a tuple. Write ({_shown(value)},) for a tuple of one."
        )
    items = []
    for i, item in enumerate(value):
        try:
            items.append(_fitted(item, item_hint))
        except _MisfitError as e:
            raise _MisfitError(f"at [{i}] {e}") from None
    return tuple(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value


def _fitted_float(value: Any) -> float:
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if math.isnan(as_float):
        raise _MisfitError("nan, which is no number. Give it a number.")
    if as_float != value:
        raise _MisfitError(f"{_shown(value)}, which no float holds exactly. Write it as a float.")
    return as_float


def _require_provides(value: Any, slot: Slot) -> None:
    if isinstance(value, Node) and value.PROVIDES == slot.interface:
        return
    what, does = _shown(value), "is no config"
    if isinstance(value, Node):
        what = f"a {short_name(type(value))}"
        does = f"provides {value.PROVIDES!r}" if value.PROVIDES else "provides no interface"
    if isinstance(value, type):
        what, does = f"the class {short_name(value)}", "is no config: give it an instance, such as XConfig()"
    offer = ", ".join(providers(slot.interface)) or "none is registered"
    raise _MisfitError(
        f"{what}, which {does}; the slot takes a component that provides {slot.interface!r}. "
        f"Registered components that do: {offer}."
    )


def _misfit(value: Any, hint: Any) -> _MisfitError:
    enums = [e for e in map(enum_of, union_members(hint)) if e is not None]
    values = [member.value for e in enums for member in e]
    for e in enums:
        if isinstance(value, str) and value in {member.value for member in e}:
            return _MisfitError(f"{value!r}, which is a str. Give it {e.__name__}.{e(value).name}.")
    allowed = describe(hint)
    hint_at = nearest(value, values) if isinstance(value, str) else ""
    return _MisfitError(f"{_shown(value)}, which is not {allowed}{hint_at}. Give it {allowed}.")


def _shown(value: Any) -> str:
    """A value in a message: its repr, cut off where it is long."""
    text = f"a {short_name(type(value))}" if isinstance(value, Node) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def describe(hint: Any) -> str:
    """An annotation in words."""
    members = [m for m in union_members(hint) if m is not RequiredType]
    if len(members) > 1:
        return " or ".join(describe(m) for m in members)
    (hint,) = members
    slot, kind = slot_of(hint), enum_of(hint)
    if slot is not None:
        return f"a component that provides {slot.interface!r}"
    if kind is not None:
        return f"one of {', '.join(repr(m.value) for m in kind)}"
    if typing.get_origin(hint) is typing.Annotated:
        return describe(hint.__origin__)
    if typing.get_origin(hint) is tuple:
        return f"a tuple, each item {describe(typing.get_args(hint)[0])}"
    return _SCALARS.get(hint) or f"a {short_name(hint)}"


def _check_annotation(where: str, hint: Any) -> None:
    for member in union_members(hint):
        slot = slot_of(member)
        if slot is not None:
            _require_interface(f"{where} has a Slot for", slot.interface)
        elif typing.get_origin(member) is typing.Annotated:
            _check_annotation(where, member.__origin__)
        elif typing.get_origin(member) is tuple and typing.get_args(member)[1:] == (...,):
            _check_annotation(where, typing.get_args(member)[0])
        elif not (
            member in _SCALARS
            or member is RequiredType
            or enum_of(member) is not None
            or (isinstance(member, type) and issubclass(member, Node))
        ):
            raise ConfigError(
                f"{where} is annotated {getattr(member, '__name__', member)}. A field holds a bool, int, float, str, "
                "member of an enum.StrEnum, config, None, or a tuple of these: annotate it with one of them, "
                "X | None or tuple[X, ...]."
            )


def _require_interface(where: str, name: str) -> Any:
    # Imported late: it brings protobuf, which a tree without components has no use for.
    from pippin.core.interface import interface

    try:
        return interface(name)
    except ConfigError as e:
        raise ConfigError(f"{where} {name!r}: {e}") from None


def _check_settings(cls: type[Node], hints: dict[str, Any]) -> None:
    """Raises unless a config has the fields that a holder of its interface sets."""
    kinds = {"INT": int, "FLOAT": float, "BOOL": bool, "STRING": str}
    for setting in _require_interface(f"{short_name(cls)} provides", cls.PROVIDES).settings:
        kind = kinds[type(setting).Type.Name(setting.type)]
        write = f"{setting.field}: " + (
            f"{kind.__name__} | None = None" if setting.optional else f"Required[{kind.__name__}] = REQUIRED"
        )
        where = f"{short_name(cls)} provides {cls.PROVIDES!r}, and who holds such a component sets its {setting.field}"
        if setting.field not in hints:
            raise ConfigError(f"{where}: it has no such field{nearest(setting.field, hints)}. Add `{write}`.")
        members = union_members(hints[setting.field])
        if kind not in members or (setting.optional and type(None) not in members):
            allowed = describe(kind | None if setting.optional else kind)
            raise ConfigError(
                f"{where} to {allowed}: the field takes {describe(hints[setting.field])}. Write `{write}`."
            )
