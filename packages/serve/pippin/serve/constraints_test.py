"""Constraints: what a model that knows nothing writes under them is what they allow."""

import json
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from pippin.core.errors import DataError
from pippin.core.tokenizer import JsonTokenizer
from pippin.serve.constraints import ConstraintCompiler
from pippin.serve.errors import ConstraintError
from pippin.serve.served_model import Grammar, JsonSchema, OneOf, Regex
from pippin.serve.tokenizer_testing import make_tokenizer

_VOCAB_SIZE = 300  # more than the tokenizer has


_TOKENIZER = make_tokenizer()
_COMPILE = ConstraintCompiler(_TOKENIZER, _VOCAB_SIZE)


def write(spec, seed=0, most=200):
    """A text that is allowed, drawn at random, and whether it is complete."""
    constraint, rng, ids = _COMPILE(spec), np.random.default_rng(seed), []
    for _ in range(most):
        allowed = np.zeros(-(-_VOCAB_SIZE // 32), np.int32)
        constraint.write_mask(allowed)
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")[:_VOCAB_SIZE]
        ids.append(int(rng.choice(np.flatnonzero(bits))))
        if constraint.accept(ids[-1]) or ids[-1] in _TOKENIZER.eos_ids:
            return _TOKENIZER.decode(ids), True
    return _TOKENIZER.decode(ids), False


def test_a_schema_makes_json_that_it_allows():
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["apple", "pear"]}, "ripe": {"type": "boolean"}},
        "required": ["name", "ripe"],
        "additionalProperties": False,
    }
    for seed in range(5):
        text, complete = write(JsonSchema(json.dumps(schema)), seed)
        value = json.loads(text)
        assert complete and value["name"] in ("apple", "pear") and isinstance(value["ripe"], bool)


def test_a_copy_goes_its_own_way():
    first = _COMPILE(OneOf(("ab", "ac")))
    (a,), (b,), (c,) = map(_TOKENIZER.encode, "abc")
    assert not first.accept(a)
    second = first.copy()
    assert first.accept(b) and second.accept(c)


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-f]{2}", r"(ja|nein) [0-9]+\.", r"é{2}x?"])
def test_a_regular_expression_matches_the_whole_text(pattern):
    for seed in range(5):
        text, complete = write(Regex(pattern), seed)
        assert complete and re.fullmatch(pattern, text)


def test_one_of_some_texts():
    choices = ('say "hi"', "back\\slash", "日本")
    assert {write(OneOf(choices), seed)[0] for seed in range(20)} == set(choices)


def test_a_grammar():
    grammar = Grammar('start: "(" (start | "x") ")"')
    for seed in range(5):
        text, complete = write(grammar, seed, most=40)
        if complete:
            assert re.fullmatch(r"\(+x\)+", text) and text.count("(") == text.count(")")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (JsonSchema("{"), "no JSON schema"),
        (JsonSchema('{"type": "nonsense"}'), "cannot be compiled"),
        (Regex("("), "cannot be compiled"),
        (Grammar("start: nowhere"), "cannot be compiled"),
    ],
    ids=["json", "schema", "regex", "grammar"],
)
def test_what_is_no_constraint_is_refused(spec, message):
    with pytest.raises(DataError, match=message) as caught:
        _COMPILE(spec)
    assert len(str(caught.value)) < 500


def test_a_token_that_is_not_allowed_is_an_error():
    constraint = _COMPILE(Regex("a"))
    with pytest.raises(RuntimeError):
        constraint.accept(_TOKENIZER.encode("b")[0])


@pytest.mark.parametrize(
    "spec",
    [
        Grammar('start: "a"~1000000'),
        Grammar("start: start"),
        Regex("(.|\n)*" * 200),
        JsonSchema(json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(2500)}})),
    ],
    ids=["long", "nothing", "expressions", "items"],
)
def test_too_much_work_is_the_constraints_fault(spec):
    with pytest.raises(ConstraintError) as caught:
        write(spec)
    assert len(str(caught.value)) < 310 and "\n" not in str(caught.value)


def test_special_tokens_are_no_text():
    constraint, allowed = _COMPILE(Regex(".*")), np.zeros(-(-_VOCAB_SIZE // 32), np.int32)
    constraint.write_mask(allowed)
    bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")
    assert all(bits[i] for i in _TOKENIZER.eos_ids)  # the text may end here
    assert not bits[_TOKENIZER.vocab_size :].any()


def test_a_tokenizer_without_an_end_cannot_be_constrained():
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    nothing = JsonTokenizer(tokenizer, {"bos": None, "eos": None, "pad": None})
    with pytest.raises(DataError, match="names no token that ends a text"):
        ConstraintCompiler(nothing, 1)
