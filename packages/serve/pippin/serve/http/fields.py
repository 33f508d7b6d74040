"""The fields of a JSON object, taken one by one."""

from collections.abc import Callable, Mapping
from typing import Any

from pippin.serve.errors import Violation

_MAX_NAME = 64
_MAX_VIOLATIONS = 32
_MAX_SECONDS = 1e9


def is_text(value: Any) -> bool:
    """A str, without halves of characters, which JSON can spell."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def prompts_of(value: Any) -> list[str | list[int]] | None:
    """Each prompt of a text, token ids, or an array of such; None: it is neither."""
    if is_text(value) or _are_ids(value):
        return [value]
    if isinstance(value, list) and value and all(is_text(p) or _are_ids(p) for p in value):
        return value
    return None


def set_prompt(fields: "Fields", name: str, request: Any, prompt: str | list[int]) -> None:
    """Puts one of `prompts_of` into a message, or notes under a name what is wrong with it."""
    try:
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()
    except ValueError:
        fields.wrong(name, "holds an id that is out of range")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda value: type(value) is int,
    "a number": lambda value: type(value) in (int, float),
    "true or false": lambda value: type(value) is bool,
    "a text": is_text,
    "an array": lambda value: isinstance(value, list),
    "an object": lambda value: isinstance(value, dict),
}


class Fields:
    """Takes the fields of a JSON object one by one, and gathers what is wrong with them. Null is no value."""

    def __init__(self, values: Mapping[str, Any], violations: list[Violation] | None = None, path: str = ""):
        self.violations: list[Violation] = [] if violations is None else violations
        self.path = path
        self._left = {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        """How many were not taken."""
        return len(self._left)

    def take(self, name: str, kind: str, *, required: bool = False) -> Any:
        """The value; None: there is none, or it is of another kind."""
        value = self._left.pop(name, None)
        if (value is None and not required) or (value is not None and _KINDS[kind](value)):
            return value
        self.wrong(name, f"must be {kind}")
        return None

    def take_any(self, name: str) -> Any:
        """The value, of any kind."""
        return self._left.pop(name, None)

    def copy(self, name: str, kind: str, message: Any, field: str) -> None:
        """Sets a field of a message to the value, if there is one."""
        value = self.take(name, kind)
        if value is None:
            return
        try:
            setattr(message, field, value)
        except (ValueError, OverflowError):
            self.wrong(name, "is out of range")

    def extend(self, name: str, values: Any, kind: str, into: Any) -> None:
        """Adds all values, of one kind, to a field of a message."""
        if values is not None and not (isinstance(values, list) and all(map(_KINDS[kind], values))):
            self.wrong(name, f"must be an array, each {kind}")
            return
        try:
            into.extend(values or ())
        except ValueError:
            self.wrong(name, "holds a number that is out of range")

    def copy_seconds(self, name: str, duration: Any) -> None:
        """Sets a Duration to the value, a number of seconds, if there is one."""
        seconds = self.take(name, "a number")
        if seconds is not None and not abs(seconds) <= _MAX_SECONDS:
            self.wrong(name, "is out of range")
        elif seconds is not None:
            duration.seconds = int(seconds)
            duration.nanos = int((seconds - int(seconds)) * 1e9)

    def nested(self, name: str, *, required: bool = False) -> "Fields | None":
        """Of an object in the object."""
        value = self.take(name, "an object", required=required)
        return None if value is None else Fields(value, self.violations, f"{self.path}{name}.")

    def wrong(self, name: str, rule: str) -> None:
        """Notes a rule that a field breaks, of the first ones."""
        if len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append(Violation(self.path + name, rule))

    def finish(self, nothing: Mapping[str, tuple[Any, ...]], harmless: frozenset[str]) -> None:
        """Notes what was not taken, but where it asks for nothing."""
        for name, value in self._left.items():
            if name in harmless or any(value == v and type(value) is type(v) for v in nothing.get(name, ())):
                continue
            rule = (
                "is not supported by this server" if name in nothing else "is no field that this server knows"
            )
            self.wrong(name[:_MAX_NAME], f"{rule}. Leave it out.")
