"""Config trees as `Component` messages and textproto, and back.

`from_proto(to_proto(cfg)) == cfg` for every registered config. No JAX.
"""

from __future__ import annotations

import enum
from typing import Any

from google.protobuf import text_format

from pippin.core.config import REQUIRED, Config, field_hints, lookup, nearest
from pippin.core.config_field import enum_of, item_hint, union_members
from pippin.core.errors import ConfigError
from pippin.v1 import component_pb2 as pb


def to_proto(cfg: Config) -> pb.Component:
    """The wire form of a config tree, defaults included."""
    message = pb.Component(type=type(cfg).TYPE, version=type(cfg).VERSION)
    for name in field_hints(type(cfg)):
        message.fields.add(name=name).value.CopyFrom(_value_to_proto(getattr(cfg, name)))
    return message


def to_text(cfg: Config) -> str:
    """The textproto of a config tree: what golden files hold."""
    return text_format.MessageToString(to_proto(cfg))


def from_text(text: str) -> Config:
    """The config tree of a `Component` textproto.

    Raises:
        ConfigError: the text is no `Component`, or `from_proto` refuses it.
    """
    try:
        message = text_format.Parse(text, pb.Component())
    except (text_format.ParseError, UnicodeError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e).rstrip(".")
        raise ConfigError(
            f"the text is not a pippin.v1.Component: {reason}. Write it with to_text."
        ) from None
    return from_proto(message)


def from_proto(message: pb.Component) -> Config:
    """The config tree of a `Component`. A field that the message lacks takes its default.

    Raises:
        ConfigError: a type that is not registered, a version newer than the code's,
            a field that the type has not, or a value that the field does not allow.
    """
    cls = lookup(message.type)
    if message.version > cls.VERSION:
        raise ConfigError(
            f"{message.type} was written with version {message.version} of its fields; this pippin knows up to "
            f"version {cls.VERSION}. Upgrade the package that holds {message.type}."
        )
    hints = field_hints(cls)
    fields = {}
    for field in message.fields:
        if field.name not in hints:
            older = message.version < cls.VERSION
            raise ConfigError(
                f"{message.type} has no field {field.name!r}{nearest(field.name, hints)}. "
                + (f"Version {message.version} may have had it: remove" if older else "Rename or remove")
                + " the field, or use the pippin that wrote it."
            )
        if field.name in fields:
            raise ConfigError(f"{message.type} has the field {field.name!r} twice. Remove one of the two.")
        fields[field.name] = _value_from_proto(f"{message.type}.{field.name}", field.value, hints[field.name])
    return cls(**fields)


def _value_to_proto(value: Any) -> pb.Value:
    if value is None:
        return pb.Value(none=pb.Empty())
    if value is REQUIRED:
        return pb.Value(required=pb.Empty())
    if isinstance(value, Config):
        return pb.Value(component=to_proto(value))
    if isinstance(value, tuple):
        return pb.Value(list=pb.List(items=[_value_to_proto(v) for v in value]))
    if isinstance(value, enum.Enum):
        return pb.Value(enum_value=value.value)
    if isinstance(value, bool):  # before int, which a bool is too
        return pb.Value(bool_value=value)
    if isinstance(value, int):
        return pb.Value(int_value=value)
    if isinstance(value, float):
        return pb.Value(float_value=value)
    return pb.Value(string_value=value)


def _value_from_proto(where: str, value: pb.Value, hint: Any) -> Any:
    kind = value.WhichOneof("kind")
    match kind:
        case "none":
            return None
        case "required":
            return REQUIRED
        case "component":
            return from_proto(value.component)
        case "list":
            of_item = item_hint(hint)
            return tuple(
                _value_from_proto(f"{where}[{i}]", v, of_item) for i, v in enumerate(value.list.items)
            )
        case "enum_value":
            return _member(where, value.enum_value, hint)
        case None:
            raise ConfigError(f"{where} has no value. Write one, such as none {{}}.")
        case _:
            return getattr(value, kind)


def _member(where: str, text: str, hint: Any) -> Any:
    enums = [e for e in map(enum_of, union_members(hint)) if e is not None]
    for e in enums:
        if text in {m.value for m in e}:
            return e(text)
    values = [m.value for e in enums for m in e]
    raise ConfigError(
        f"{where} got the enum_value {text!r}{nearest(text, values)}. "
        + (
            f"Its values are {', '.join(map(repr, values))}."
            if values
            else "It is no enumeration: write a string_value."
        )
    )
