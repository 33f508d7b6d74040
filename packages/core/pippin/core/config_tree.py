"""Whole config trees: traverse, override by path, replace by kind, diff, and modifiers.

All functions return new trees; none changes its argument.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar, get_origin

from pippin.core.config import REQUIRED, Config, check_value, children, field_hints, lookup, require_field
from pippin.core.config_field import enum_of, item_hint, slot_of, union_members
from pippin.core.errors import ConfigError
from pippin.core.registry import short_name

C = TypeVar("C", bound=Config)

# What carries a change of a whole tree, such as everything that depends on hardware.
Modifier = Callable[[C], C]


def chain[T: Config](*modifiers: Modifier[T]) -> Modifier[T]:
    """The modifier that applies several, in order."""

    def apply(cfg: T) -> T:
        for modifier in modifiers:
            cfg = _require_config(modifier(cfg), modifier)
        return cfg

    return apply


def _require_config(result: Any, made_by: Any) -> Any:
    if not isinstance(result, Config):
        raise ConfigError(
            f"the modifier {getattr(made_by, '__qualname__', made_by)} returned {result!r}, which is no config. "
            "Return the changed tree: trees are not changed in place."
        )
    return result


def traverse(cfg: Config, path: str = "") -> Iterator[tuple[str, Config]]:
    """A config and all configs inside it, parents first, each with its path; the root's is empty."""
    yield path, cfg
    for step, child in children(cfg):
        yield from traverse(child, f"{path}.{step}" if path else step)


def transform[T: Config](cfg: T, fn: Callable[[Config], Config]) -> T:
    """A tree with `fn` applied to every config in it, children first.

    Raises:
        ConfigError: a result does not fit the field that it came from.
    """

    def item(value: Any) -> Any:
        if isinstance(value, Config):
            return transform(value, fn)
        return tuple(item(v) for v in value) if isinstance(value, tuple) else value

    changed = {}
    for name in field_hints(type(cfg)):
        old = getattr(cfg, name)
        new = item(old)
        if new is not old and new != old:
            changed[name] = new
    # A child that was transformed was not chosen by the caller; only `_chosen` of the parent stays as it was.
    return _require_config(fn(_keep_chosen(cfg.set(**changed), cfg) if changed else cfg), fn)


_Change = tuple[list[str], Any]  # the steps of a path, and the value to put there


def override[T: Config](cfg: T, changes: Mapping[str, Any]) -> T:
    """A tree with other values at some dotted paths, such as `decoder.layer.feed_forward.hidden_dim`.

    A step into a tuple is an index; `*` stands for every index. A value may be
    text as typed on a command line (see `parse_value`). The values of one
    component are set together, so that they need only fit each other when all are
    set; otherwise the order of the changes counts.

    Raises:
        ConfigError: a path leads nowhere (the error names the nearest field), or the value does not fit.
    """
    return _override(cfg, [(path.split("."), value) for path, value in changes.items()], done="")


def _override(cfg: Any, changes: list[_Change], done: str) -> Any:
    values = {}
    for step in dict.fromkeys(steps[0] for steps, _ in changes):
        if not isinstance(cfg, Config):
            at = done.rstrip(".")
            raise ConfigError(
                f"{at} is {show(cfg)}, which has no fields, so {done}{step} leads nowhere. Set {at} itself."
            )
        require_field(type(cfg), step, done)
        inside = [(steps[1:], value) for steps, value in changes if steps[0] == step]
        values[step] = _override_value(
            getattr(cfg, step), inside, f"{done}{step}", field_hints(type(cfg))[step]
        )
    return cfg.set(**values)


def _override_value(old: Any, changes: list[_Change], at: str, hint: Any) -> Any:
    """A value after the changes to it (no steps left) and inside it, in order."""
    inside: list[_Change] = []
    for steps, value in changes:
        if steps:
            inside.append((steps, value))
            continue
        # What was to change inside the old value goes with it, but is looked at: its path may be wrong.
        old, inside = _override_inside(old, inside, at, hint), []
        old = parse_value(at, value, hint, old) if isinstance(value, str) else check_value(at, value, hint)
    return _override_inside(old, inside, at, hint)


def _override_inside(old: Any, changes: list[_Change], at: str, hint: Any) -> Any:
    if not changes or not isinstance(old, tuple):
        return _override(old, changes, f"{at}.") if changes else old
    for (step, *_), _ in changes:
        if not (step == "*" and old) and not (step.isdecimal() and int(step) < len(old)):
            rule = (
                f"Use an index from 0 to {len(old) - 1}, or *."
                if old
                else "Set it to a tuple with items first."
            )
            raise ConfigError(f"{at}.{step} leads nowhere: {at} has {len(old)} items. {rule}")
    return tuple(
        _override_value(
            item,
            [(steps[1:], value) for steps, value in changes if steps[0] in ("*", str(i))],
            f"{at}.{i}",
            item_hint(hint),
        )
        for i, item in enumerate(old)
    )


def parse_value(where: str, text: str, hint: Any, old: Any = REQUIRED) -> Any:
    """A field's value from text: a number, true or false, none, a member's value, text; a tuple as 1,2 or [1, 2].

    For a config, the name of a component type: the new component takes over the
    fields that it shares with the old one.

    Raises:
        ConfigError: the text is none of what the annotation allows.
    """
    for member in sorted(union_members(hint), key=_reading_order):
        value = _parse(where, text, member, old)
        if value is not _UNREADABLE:
            return check_value(where, value, hint)
    return check_value(where, text, hint)  # says what is allowed


_UNREADABLE = object()


def _reading_order(hint: Any) -> int:
    """None before all, as it is typed like a str; str after all, as everything can be read as one."""
    return 0 if hint is type(None) else 2 if hint is str else 1


def _parse(where: str, text: str, hint: Any, old: Any) -> Any:
    """The value that text is of an annotation that is no union, or `_UNREADABLE`."""
    kind = enum_of(hint)
    word = text.strip().lower()
    if hint is str:
        return text
    if hint is type(None):
        return None if word == "none" else _UNREADABLE
    if hint is bool:
        return {"true": True, "false": False}.get(word, _UNREADABLE)
    if hint in (int, float):
        try:
            return hint(word)
        except ValueError:
            return _UNREADABLE
    if kind is not None:
        return next((m for m in kind if m.value.lower() == word), _UNREADABLE)
    if get_origin(hint) is tuple:
        return _parse_tuple(where, text, hint)
    if slot_of(hint) is None and not (isinstance(hint, type) and issubclass(hint, Config)):
        return _UNREADABLE
    if word == "none":
        return _UNREADABLE
    new = lookup(text.strip())()
    return inherit(new, old) if isinstance(old, Config) else new


def _parse_tuple(where: str, text: str, hint: Any) -> Any:
    text = text.strip()
    try:
        items = (
            json.loads(text)
            if text.startswith("[")
            else [t.strip() for t in text.strip("()").split(",") if t]
        )
    except (ValueError, RecursionError):
        return _UNREADABLE

    def read(item: Any, at: str, hint: Any) -> Any:
        if isinstance(item, str):
            return parse_value(at, item, hint)
        if isinstance(item, list) and get_origin(hint) is tuple:
            return tuple(read(v, f"{at}.{i}", item_hint(hint)) for i, v in enumerate(item))
        return item

    return tuple(read(item, f"{where}.{i}", item_hint(hint)) for i, item in enumerate(items))


def replace[T: Config](cfg: T, kind: type, new: Config | Callable[[Config], Config]) -> T:
    """A tree with every component of a kind swapped for another, keeping the fields that both have.

        replace(cfg, FeedForwardConfig, MoEConfig(num_experts=8))

    A field that was set on `new` keeps its value; any other field that the
    replaced config has too, by name, is copied from it.

    Args:
        cfg: the tree.
        kind: a config class, or a component class with a nested `Config`; its subclasses count too.
        new: the replacement, or a function from the old config to the new one.

    Raises:
        ConfigError: nothing in the tree is of that kind, or `new` does not fit a slot.
    """
    kind = kind.__dict__.get("Config", kind) if isinstance(kind, type) else kind
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        raise ConfigError(
            f"replace got {kind!r} as the kind to replace. Give it a config class, such as FeedForwardConfig."
        )
    if isinstance(new, type) or not (isinstance(new, Config) or callable(new)):
        raise ConfigError(
            f"replace got {new!r} as new. Give it a config, such as MoEConfig(...), or a function from the old one."
        )
    found = 0

    def swap(old: Config) -> Config:
        nonlocal found
        if not isinstance(old, kind):
            return old
        found += 1
        return inherit(new, old) if isinstance(new, Config) else _require_config(new(old), new)

    result = transform(cfg, swap)
    if not found:
        kinds = sorted({short_name(type(c)) for _, c in traverse(cfg)})
        raise ConfigError(
            f"replace: {short_name(type(cfg))} holds no {short_name(kind)}, so nothing would change. "
            f"It is composed of {', '.join(kinds)}."
        )
    return result


def inherit[T: Config](new: T, old: Config) -> T:
    """`new` with each field that was not set on it and that `old` has too, by name and type, taken from `old`."""
    shared = {}
    for name, hint in field_hints(type(new)).items():
        if name in new.chosen or name not in field_hints(type(old)):
            continue
        try:
            shared[name] = check_value(name, getattr(old, name), hint)
        except ConfigError:
            continue
    return _keep_chosen(new.set(**shared), new) if shared else new


def _keep_chosen[T: Config](cfg: T, like: Config) -> T:
    object.__setattr__(cfg, "_chosen", like.chosen)
    return cfg


def flatten(cfg: Config) -> dict[str, Any]:
    """Every value in a tree by path; a component's own path maps to its type name."""
    flat: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Config):
            flat[path] = type(value).TYPE
            for name in field_hints(type(value)):
                add(f"{path}.{name}" if path else name, getattr(value, name))
        elif isinstance(value, tuple) and any(isinstance(v, Config) for v in value):
            for i, item in enumerate(value):
                add(f"{path}.{i}", item)
        else:
            flat[path] = value

    add("", cfg)
    return flat


def diff(old: Config, new: Config) -> list[str]:
    """The differences of two trees, one line each: `path: old -> new`. Empty if they are equal."""
    before, after = flatten(old), flatten(new)
    lines = []
    for path in [*before, *(p for p in after if p not in before)]:
        a, b = before.get(path, _ABSENT), after.get(path, _ABSENT)
        if a != b or type(a) is not type(b):
            lines.append(f"{path or '(root)'}: {show(a)} -> {show(b)}")
    return lines


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def show(value: Any) -> str:
    """A value as it is printed in configs; a config as its type's name."""
    if isinstance(value, Config):
        return type(value).TYPE
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Enum) and value is not REQUIRED:
        return str(value.value)
    return repr(value)


def config_text(cfg: Config) -> str:
    """A tree as indented text, one field a line, defaults included."""
    lines: list[str] = []

    def add(name: str, value: Any, depth: int) -> None:
        pad = "  " * depth
        if isinstance(value, Config):
            lines.append(f"{pad}{name}: {type(value).TYPE}")
            for field in dataclasses.fields(value):  # type: ignore[arg-type]
                add(field.name, getattr(value, field.name), depth + 1)
        elif isinstance(value, tuple) and any(isinstance(v, Config) for v in value):
            lines.append(f"{pad}{name}:")
            for i, item in enumerate(value):
                add(str(i), item, depth + 1)
        else:
            lines.append(f"{pad}{name}: {show(value)}")

    add("config", cfg, 0)
    return "\n".join(lines) + "\n"
