"""Whole config trees: traverse, override by path, replace by kind, diff, and modifiers.

All functions return new trees; none changes its argument.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar

from pippin.core.config import (
    REQUIRED,
    Config,
    RequiredType,
    Slot,
    check_value,
    children,
    field_hints,
    lookup,
    require_field,
    union_members,
)
from pippin.core.errors import ConfigError

C = TypeVar("C", bound=Config)

Modifier = Callable[
    [C], C
]  # what carries a change of a whole tree, such as everything that depends on hardware


def chain(*modifiers: Modifier[C]) -> Modifier[C]:
    """The modifier that applies several, in order."""

    def apply(cfg: C) -> C:
        for modifier in modifiers:
            cfg = modifier(cfg)
        return cfg

    return apply


def traverse(cfg: Config, path: str = "") -> Iterator[tuple[str, Config]]:
    """A config and all configs inside it, parents first, each with its path; the root's is empty."""
    yield path, cfg
    for step, child in children(cfg):
        yield from traverse(child, f"{path}.{step}" if path else step)


def transform(cfg: C, fn: Callable[[Config], Config]) -> C:
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
    result = fn(_keep_chosen(cfg.set(**changed), cfg) if changed else cfg)
    return result  # type: ignore[return-value]


_Change = tuple[list[str], Any]  # the steps of a path, and the value to put there


def override(cfg: C, changes: Mapping[str, Any]) -> C:
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
    if isinstance(cfg, tuple):
        return _override_items(cfg, changes, done)
    values = {}
    for step in dict.fromkeys(steps[0] for steps, _ in changes):
        if not isinstance(cfg, Config):
            raise ConfigError(
                f"{done.rstrip('.')} is {cfg!r}, which has no fields, so {done}{step} leads nowhere. "
                f"Set {done.rstrip('.')} itself."
            )
        require_field(type(cfg), step, done)
        inside = [(steps[1:], value) for steps, value in changes if steps[0] == step]
        hint = field_hints(type(cfg))[step]

        def parse(value: Any, old: Any, where: str = done + step, hint: Any = hint) -> Any:
            return parse_value(where, value, hint, old) if isinstance(value, str) else value

        values[step] = _override_value(getattr(cfg, step), inside, f"{done}{step}.", parse)
    return cfg.set(**values)


def _override_items(items: tuple[Any, ...], changes: list[_Change], done: str) -> tuple[Any, ...]:
    for (step, *_), _ in changes:
        if step != "*" and not (step.isdecimal() and int(step) < len(items)):
            raise ConfigError(
                f"{done}{step}: {done.rstrip('.')} has {len(items)} items. "
                f"Use an index from 0 to {len(items) - 1}, or *."
            )
    return tuple(
        _override_value(
            item,
            [(steps[1:], value) for steps, value in changes if steps[0] in ("*", str(i))],
            f"{done}{i}.",
            parse=lambda value, old: value,
        )
        for i, item in enumerate(items)
    )


def _override_value(old: Any, changes: list[_Change], done: str, parse: Callable[[Any, Any], Any]) -> Any:
    """A value after the changes to it (no steps left) and inside it, in order."""
    inside: list[_Change] = []
    for steps, value in changes:
        if steps:
            inside.append((steps, value))
        else:
            # What was to change inside the old value goes with it, but is looked at: its path may be wrong.
            old, inside = parse(value, _override(old, inside, done) if inside else old), []
    return _override(old, inside, done) if inside else old


def parse_value(where: str, text: str, hint: Any, old: Any = REQUIRED) -> Any:
    """A field's value from text: a number, true or false, none, a member's value, a JSON list for a tuple.

    For a slot, the name of a component type: the new component takes over the
    fields that it shares with the old one.

    Raises:
        ConfigError: the text is none of what the annotation allows.
    """
    for member in union_members(hint):
        for parse in (_parse_slot, _parse_plain):
            value = parse(text, member, old)
            if value is not REQUIRED:
                check_value(where, value, hint)
                return value
    check_value(where, text, hint)  # says what is allowed
    return text


def _parse_slot(text: str, hint: Any, old: Any) -> Any:
    marks = getattr(hint, "__metadata__", ())
    if not any(isinstance(m, Slot) for m in marks) or text.lower() == "none":
        return REQUIRED
    new = lookup(text)()
    return inherit(new, old) if isinstance(old, Config) else new


def _parse_plain(text: str, hint: Any, old: Any) -> Any:
    """The parsed text, or REQUIRED where it is not of this annotation's form."""
    origin = getattr(hint, "__origin__", None)
    if hint is type(None):
        return None if text.lower() == "none" else REQUIRED
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), REQUIRED)
    if hint in (int, float):
        try:
            return hint(text.replace("_", ""))
        except ValueError:
            return REQUIRED
    if isinstance(hint, type) and issubclass(hint, Enum) and hint is not RequiredType:
        return next((m for m in hint if m.value == text.lower()), REQUIRED)
    if origin is tuple:
        try:
            items = json.loads(text) if text.startswith("[") else text.split(",")
        except json.JSONDecodeError:
            return REQUIRED
        item_hint = hint.__args__[0]
        return tuple(parse_value("item", i, item_hint) if isinstance(i, str) else i for i in items)
    return text if hint is str else REQUIRED


def replace(cfg: C, kind: type, new: Config | Callable[[Config], Config]) -> C:
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
    kind = getattr(kind, "Config", kind)
    found = 0

    def swap(old: Config) -> Config:
        nonlocal found
        if not isinstance(old, kind):
            return old
        found += 1
        return inherit(new, old) if isinstance(new, Config) else new(old)

    result = transform(cfg, swap)
    if not found:
        kinds = sorted({type(c).__name__ for _, c in traverse(cfg)})
        raise ConfigError(
            f"replace: {type(cfg).__name__} holds no {kind.__name__}, so nothing would change. "
            f"It is composed of {', '.join(kinds)}."
        )
    return result


def inherit(new: C, old: Config) -> C:
    """`new` with each field that was not set on it and that `old` has too, by name and type, taken from `old`."""
    shared = {}
    for name, hint in field_hints(type(new)).items():
        if name in new.chosen or name not in field_hints(type(old)):
            continue
        value = getattr(old, name)
        try:
            check_value(name, value, hint)
        except ConfigError:
            continue
        shared[name] = value
    return _keep_chosen(new.set(**shared), new) if shared else new


def _keep_chosen(cfg: C, like: Config) -> C:
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
    """A value as it is printed in configs and typed in overrides."""
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
