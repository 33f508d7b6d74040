import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.serve.http.body import parse_object
from pippin.serve.http.problem import Problem

_TEXTS = st.text('ab"\\[]{}é\n', max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_TEXTS, _VALUES, max_size=4))
def test_what_json_can_write_is_read(value):
    assert parse_object(json.dumps(value).encode(), max_depth=64) == value


@given(st.binary(max_size=100))
def test_any_bytes_are_an_object_or_refused(data):
    try:
        assert isinstance(parse_object(data, 8), dict)
    except Problem as problem:
        assert problem.status == 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a":' + "9" * 5000 + "}",
        "\xff",
    ],
)
def test_what_is_no_object_is_refused(text):
    with pytest.raises(Problem, match="JSON"):
        parse_object(text.encode("latin-1"), 8)


def test_nesting_is_counted_outside_of_texts_only():
    assert parse_object(b'{"a": "[[[[", "b": "\\"[[[[", "c": [[1]]}', 3)["c"] == [[1]]
    with pytest.raises(Problem, match="deeper than 3"):
        parse_object(b'{"c": [[[1]]]}', 3)
    with pytest.raises(Problem, match="deeper"):
        parse_object(b'{"c":' + b"[" * 100_000, 64)


def test_other_encodings_are_refused_before_their_brackets_could_be_miscounted():
    # In UTF-16, a byte of a letter looks like the quotes that end a text.
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        with pytest.raises(Problem, match="JSON"):
            parse_object(('{"a":"\u0122","b":' + "[" * 900 + "]" * 900 + "}").encode(encoding), 64)


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"[]", b"[],", b'"\\'])
def test_no_body_takes_long_to_refuse(piece):
    data = b'{"a":"' + piece * (1_000_000 // len(piece))
    began = time.monotonic()
    with pytest.raises(Problem):
        parse_object(data, 64)
    assert time.monotonic() - began < 3
