"""A Jinja environment for templates from outside: they reach nothing, and their time and memory are bounded.

What chat templates use is there, as transformers has it. What makes much out
of little (padding, formats, `indent`, `lipsum`, `include`) is not; loops and
calls are counted, and the size of what an operation makes is known before.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARS = 4 << 20  # of any string that a template makes, and of what it renders
MAX_ELEMENTS = 200_000  # of a list, with all that its elements hold
MAX_STEPS = 1_000_000  # turns of loops, calls, and blocks of characters that are copied
MAX_SECONDS = 10.0

_CHARS_A_STEP = 64
_MAX_NUMBER_BITS = 256
_MAX_INDENT = 8

# fmt: off
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "unique", "upper", "wordcount",
)
# fmt: on
_GLOBALS = ("cycler", "dict", "joiner", "namespace", "range")
# Methods of strings that make as many characters as a number says, or read a language of their own.
_REFUSED_METHODS = frozenset(
    ("center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
)


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that does more than any that writes a conversation."""


class _Meter:
    """What one rendering may still do."""

    def __init__(self):
        self._steps = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS} steps or {MAX_SECONDS:.0f} s")

    def make(self, size: int) -> None:
        """Pays for something of so many characters or elements."""
        if size > MAX_CHARS:
            raise TemplateLimitError(f"it makes {size} characters at once; the limit is {MAX_CHARS}")
        self.spend(1 + max(size, 0) // _CHARS_A_STEP)


_meter: contextvars.ContextVar[_Meter] = contextvars.ContextVar("meter")


@contextlib.contextmanager
def metered() -> Iterator[None]:
    """Renderings inside have one budget, their own."""
    token = _meter.set(_Meter())
    try:
        yield
    finally:
        _meter.reset(token)


class _Generator(CodeGenerator):
    """Has loops counted, and `~` and what holds other values measured."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        counted = nodes.EnvironmentAttribute("counted", lineno=node.lineno)
        node.iter = nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measure(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measure(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measure(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measure(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}`, by which transformers finds the assistant's tokens: here, only what is inside."""

    tags = {"generation"}  # noqa: RUF012  as its base has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment. Render inside `metered()`."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while a template is compiled
            cache_size=0,
            extensions=[LoopControlExtension, _Generation],
        )
        self.filters = {name: self.filters[name] for name in _FILTERS} | {"tojson": _to_json}
        self.filters |= {"replace": _replaced, "join": _joined, "list": _listed}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        refused = isinstance(obj, str) and attr in _REFUSED_METHODS
        return not refused and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing stands in for `str.format`: it is refused."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _meter.get().spend(1)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name == "replace":
                return _replaced(owner, *args)
            if name == "join":
                return _joined(args[0], owner)
            _meter.get().make(len(owner))
        return self.measured(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise TemplateLimitError("it formats with %")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_NUMBER_BITS:
                raise TemplateLimitError(f"it computes a number of {bits} bits")
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            text, times = (left, right) if isinstance(left, str) else (right, left)
            if not isinstance(text, str):
                raise TemplateLimitError("it repeats a list")
            _meter.get().make(int(len(text) * times))
        elif operator == "+" and isinstance(left, Sequence) and isinstance(right, Sequence):
            _meter.get().make(len(left) + len(right))
            return self.measured(super().call_binop(context, operator, left, right))
        return super().call_binop(context, operator, left, right)

    def measured(self, value: Any) -> Any:
        """The value, if it is small enough to be written out, with all that it holds."""
        chars, elements, waiting = 0, 0, [value]
        while waiting:
            item = waiting.pop()
            chars += len(item) if isinstance(item, str) else 0
            elements += 1
            if isinstance(item, Namespace):
                item = getattr(item, "_Namespace__attrs")  # noqa: B009  it has no other name
            if isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                waiting += item
            if chars > MAX_CHARS or elements + len(waiting) > MAX_ELEMENTS:
                raise TemplateLimitError(
                    f"it makes a value of more than {MAX_CHARS} characters or {MAX_ELEMENTS} elements"
                )
        _meter.get().make(chars)
        _meter.get().spend(elements)
        return value

    def counted(self, values: Any) -> Any:
        """The values of a loop, paid for."""
        if hasattr(values, "__len__"):
            _meter.get().spend(len(values))
            return values
        return _count(values)

    def concatenated(self, parts: Sequence[Any]) -> str:
        """The parts of `~` as one string."""
        return self.concat(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What a macro or a block makes, as one string."""
        texts = list(parts)
        _meter.get().make(sum(map(len, texts)))
        return "".join(texts)


def _count(values: Any) -> Iterator[Any]:
    for value in values:
        _meter.get().spend(1)
        yield value


def _replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    _meter.get().make(len(text) + times * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _joined(values: Any, by: str = "", attribute: str | None = None) -> str:
    texts = [str(value if attribute is None else value[attribute]) for value in _count(values)]
    _meter.get().make(sum(map(len, texts)) + len(by) * len(texts))
    return str(by).join(texts)


def _listed(values: Any) -> list[Any]:
    return list(_count(values))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise TemplateLimitError(f"it indents JSON by {indent}")
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _meter.get().make(len(text))
    return text


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if len(form) > 256 or re.search("%[^A-Za-z%-]", form):
        raise TemplateLimitError(f"it writes the time as {form[:40]!r}")
    return datetime.datetime.now().strftime(form)
