"""The rules by which components are written as programs, one registry for each kind of program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pippin.core.config import Config
from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError
from pippin.core.registry import component_name

# What changes how something is computed or begun, not what is computed.
_NOTHING_TO_WRITE = frozenset({"", "initializer", "attention_kernel", "kv_cache"})

Rule = Callable[..., Any]  # (emitter, cfg, path, *values) -> result


class Rules:
    """What writes components as programs of one kind."""

    def __init__(self, program: str):
        """`program` ends "a rule that writes X ...": "as a Core ML program"."""
        self._program = program
        self._rules: dict[type[Config], Rule] = {}  # config class -> what writes its component

    def __getitem__(self, kind: type[Config]) -> Rule:
        return self._rules[kind]

    def rule(self, *kinds: type[Config]) -> Callable[[Rule], Rule]:
        """Declares a function as what writes components of these config classes."""

        def declare(write: Rule) -> Rule:
            self._rules.update(dict.fromkeys(kinds, write))
            return write

        return declare

    def require(self, cfg: Config) -> None:
        """Raises unless every component of a tree has a rule.

        Raises:
            ConfigError: one has none; it is named, and those that have one.
        """
        missing: dict[str, list[str]] = {}  # component -> paths
        for path, child in traverse(cfg):
            if type(child).PROVIDES not in _NOTHING_TO_WRITE and type(child) not in self._rules:
                missing.setdefault(component_name(type(child)), []).append(path or "the model")
        if missing:
            named = "; ".join(
                f"{name} (at {paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)})"
                for name, paths in missing.items()
            )
            known = ", ".join(sorted(component_name(kind) for kind in self._rules))
            raise ConfigError(
                f"there is no rule that writes {named} {self._program}. Rules are there for {known}. Replace the "
                "component before training, or write a rule for it beside these."
            )
