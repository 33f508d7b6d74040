import contextlib
import time
from typing import Any

import jinja2
import pytest

from pippin.core.chat_sandbox import MAX_CHARS, ChatEnvironment, TemplateLimitError, metered

_MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _render(source: str, **variables: Any) -> str:
    with metered():
        return ChatEnvironment().from_string(source).render(messages=_MESSAGES, **variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ loop.index0 }}{{ m['role'] }}:{{ m.content }};{% endfor %}", "0user:Hi;1assistant:Hello;"),
        ("{%- for m in messages if m.role == 'user' -%}\n  {{- m.content + '!' -}}\n{%- endfor %}", "Hi!"),
        ("{% for m in messages %}{{ loop.last }}{{ loop.length }} {% endfor %}", "False2 True2 "),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f('a') }}", "<1><a>"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("a\n    {% if true %}\nb\n    {% endif %}\nc", "a\nb\nc"),  # blocks leave no lines of their own
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ ' a-b '.strip().split('-') | last }}{{ 'x'.replace('x', 'y') }}{{ ','.join(['1', '2']) }}", "by1,2"),
        ("{{ ['a', 'b'] | join(', ') }}{{ 'aa' | replace('a', 'b', 1) }}{{ 'Ab' | upper }}", "a, bbaAB"),
        ("{{ messages | map(attribute='content') | join }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}", "HiHello1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 7 % 4 * 2 }}{{ 'ab' * 2 }}{{ [1] + [2] }}", "a16abab[1, 2]"),
        ("{% set a, b = 1, 2 %}{{ a }}{{ messages[1:][0].role }}{{ 'x' in 'xy' and b is number }}", "1assistantTrue"),
    ],
)  # fmt: skip
def test_what_chat_templates_use_is_there(source: str, text: str) -> None:
    assert _render(source) == text


def test_the_time_is_this_years() -> None:
    assert _render("{{ strftime_now('%d %b %Y') }}").endswith(time.strftime("%Y"))


_DOUBLING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{change}{{% endfor %}}{{{{ ns.x }}}}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * 10**10 }}",
        "{{ 10**(10**10) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        _DOUBLING.format(start="'a'", change="{% set ns.x = ns.x + ns.x %}"),
        _DOUBLING.format(start="'a'", change="{% set ns.x = ns.x ~ ns.x %}"),
        _DOUBLING.format(start="'a'", change="{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
        _DOUBLING.format(start="'a'", change="{% set ns.x = ns.x.replace('a', ns.x) ~ 'a' %}"),
        _DOUBLING.format(start="'a'", change="{% set ns.x = ns.x | replace('a', 'aa') %}"),
        _DOUBLING.format(start="'a'", change="{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
        _DOUBLING.format(start="'a'", change="{% set ns.x = [ns.x, ns.x] | join(ns.x) %}"),
        _DOUBLING.format(start="1", change="{% set ns.x = [ns.x, ns.x] %}"),
        _DOUBLING.format(start="1", change="{% set ns.x = (ns.x, ns.x) %}"),
        _DOUBLING.format(start="1", change="{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
        _DOUBLING.format(start="1", change="{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
        _DOUBLING.format(start="1", change="{% set ns.x = namespace(a=ns.x, b=ns.x) %}"),
        _DOUBLING.format(start="[1]", change="{% set ns.x = ns.x + ns.x %}"),
        _DOUBLING.format(start="7", change="{% set ns.x = ns.x * ns.x %}"),
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ [ns] }}",
    ],
)
def test_a_template_that_makes_too_much_is_stopped_at_once(source: str) -> None:
    start = time.monotonic()
    with pytest.raises((jinja2.TemplateError, RecursionError, OverflowError)):
        _render(source)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ lipsum() }}",
        "{{ strftime_now.__globals__['datetime'] }}",
    ],
)
def test_a_template_reaches_nothing(source: str) -> None:
    with contextlib.suppress(jinja2.TemplateError):
        assert _render(source) == ""


@pytest.mark.parametrize("source", ["{% include 'x' %}", "{% import 'x' as x %}", "{% extends 'x' %}"])
def test_there_are_no_other_files(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError)):
        _render(source)


def test_a_large_message_has_room() -> None:
    assert len(_render("{{ m + '.' }}", m="x" * (MAX_CHARS - 1))) == MAX_CHARS
    with pytest.raises(TemplateLimitError, match="characters at once"):
        _render("{{ m + '.' }}", m="x" * MAX_CHARS)


def test_each_rendering_has_its_own_budget() -> None:
    template = ChatEnvironment().from_string(
        "{% for i in range(6) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    )
    for _ in range(2):
        with metered():
            template.render()
