"""Requests as nobody means them, made of random numbers: the same number, the same request."""

import json
import math
import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pippin.v1 import inference_pb2 as pb
from tests.robustness.shared import ADAPTERS

_INTEGERS = (0, 1, 2, 5, -1, 7, 100, 271, 272, 2**31 - 1, -(2**31))
_LONGS = (*_INTEGERS, 2**63 - 1, -(2**63), 2**53)
_FLOATS = (0.0, 1.0, 0.5, -0.0, -1.0, 1e-45, 3e38, -3e38, math.nan, math.inf, -math.inf, 2.0, 1e-4)
_TEXTS = (
    "",
    "a",
    "hello",
    "é",
    "\u0000",
    "\U0010ffff",
    "<eos>",
    "true",
    "../../etc/passwd",
    "a" * 300,
    "{}",
    "(",
    "[a",
)
_CPP = FieldDescriptor
_LEAST_MESSAGE = 3  # bytes that are mutated in one place at least


def message_bytes(rng: random.Random, method: str) -> bytes:
    """The bytes of a request: random ones, or of a random message, whole, cut, or changed in places."""
    kind = rng.random()
    if kind < 0.15:
        return rng.randbytes(rng.randrange(200))
    data = random_message(rng, getattr(pb, f"{method}Request")()).SerializeToString()
    if kind < 0.65 or len(data) < _LEAST_MESSAGE:
        return data
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randrange(1, 4)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(1, 8))
            case _:
                changed[at:at] = changed[
                    at : at + rng.randrange(40)
                ]  # a part of it again, perhaps inside of it
        if not changed:
            break
    return bytes(changed)


def random_message[M: Message](rng: random.Random, message: M, depth: int = 0) -> M:
    """Sets some fields of a message to usual and unusual values. Most prompts are right, so that other fields count."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > (0.15 if depth == 0 else 0.6):
            continue
        if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
            message.logit_bias[rng.choice(_INTEGERS)] = rng.choice(_FLOATS)
        elif field.is_repeated:
            for _ in range(rng.choice((0, 1, 2, 20))):
                if field.message_type is not None:
                    random_message(rng, getattr(message, field.name).add(), depth + 1)
                else:
                    getattr(message, field.name).append(_scalar(rng, field))
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            random_message(rng, getattr(message, field.name), depth + 1)
        else:
            setattr(message, field.name, _scalar(rng, field))
    if isinstance(message, pb.GenerateRequest):
        _mostly_right(rng, message)
    return message


def _mostly_right(rng: random.Random, request: pb.GenerateRequest) -> None:
    if rng.random() < 0.7:
        request.text = rng.choice(_TEXTS[1:])
    if rng.random() < 0.7:
        request.max_tokens = rng.randrange(1, 4)
    if (kind := rng.random()) < 0.5:
        request.ClearField("adapter")
    elif kind < 0.9:
        request.adapter = rng.choice(ADAPTERS)
    if rng.random() < 0.8:
        request.ClearField("constraint")


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case _CPP.CPPTYPE_STRING if field.type == _CPP.TYPE_STRING:
            return rng.choice(_TEXTS)
        case _CPP.CPPTYPE_INT32:
            return rng.choice(_INTEGERS)
        case _CPP.CPPTYPE_INT64:
            return rng.choice(_LONGS)
        case _CPP.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case _CPP.CPPTYPE_FLOAT | _CPP.CPPTYPE_DOUBLE:
            return rng.choice(_FLOATS)
        case _:
            raise AssertionError(f"{field.full_name} is of a type that requests had not")


_NAMES = (
    *(
        "model",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "logprobs",
        "top_logprobs",
    ),
    *(
        "logit_bias",
        "response_format",
        "structured_outputs",
        "stop_token_ids",
        "ignore_eos",
        "priority",
        "timeout",
    ),
    *(
        "cache_salt",
        "user",
        "tools",
        "presence_penalty",
        "stream_options",
        "metadata",
        "best_of",
        "echo",
        "\ud800",
    ),
)


def json_body(rng: random.Random, *, chat: bool) -> bytes:
    """The body of a request over HTTP."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(100))
    body = {rng.choice(_NAMES): json_value(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 5)))}
    if rng.random() < 0.85:
        body["max_tokens"] = rng.randrange(1, 4)
    if rng.random() < 0.3:
        body["model"] = rng.choice(ADAPTERS)
    right = [{"role": "user", "content": "hello"}] if chat else "hello"
    body["messages" if chat else "prompt"] = right if rng.random() < 0.8 else json_value(rng)
    text = json.dumps(body)  # with NaN and Infinity, which are no JSON
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("", "\\", '"', "{", "[", "1" * 5000, "\x00", "]}")) + text[at + 1 :]
    return text.encode()


def json_value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that can be written as JSON, and a few things that cannot."""
    match rng.randrange(9 if depth < 4 else 7):
        case 0:
            return rng.choice(_LONGS)
        case 1:
            return rng.choice((10**30, -(10**400), 1e308))
        case 2:
            return rng.choice(_FLOATS)
        case 3:
            return rng.choice((True, False, None))
        case 4 | 5:
            return rng.choice((*_TEXTS, "\ud800", "text", "json_object", "json_schema"))
        case 6:
            return rng.choice(([], {}, [0], ["a"], {"type": "json_object"}, {"5": 1}, {"regex": "a+"}))
        case 7:
            return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            return {
                rng.choice((*_NAMES, *_TEXTS)): json_value(rng, depth + 1) for _ in range(rng.randrange(4))
            }


# What is said of them elsewhere: they killed an engine, or took all its memory or its time. name -> field, value
CONSTRAINTS: dict[str, tuple[str, str]] = {
    "regex that repeats repetitions": ("regex", "((a{1,500}){1,500}){1,500}"),
    "regex that backtracks": ("regex", "(a*)*(a*)*(a*)*(a+)+b"),
    "regex of deep groups": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "regex of many choices": ("regex", "|".join(f"a{i}b*" for i in range(6000))),
    "regex that looks around": ("regex", r"(?=a)(?<!b)a\1"),
    "regex of classes": ("regex", r"(\p{L}|\p{N}|[^\x00-\x7f]){50,5000}"),
    "regex of a dot": ("regex", "(.|\n)*" * 200),
    "schema that is no object": ("json_schema", '""'),
    "schema of numbers": ("json_schema", '{"type": 5, "properties": 7}'),
    "schema of itself": ("json_schema", '{"$ref": "#"}'),
    "schema from elsewhere": ("json_schema", '{"$ref": "http://169.254.169.254/latest/meta-data"}'),
    "schema of a file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "schema of many": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(2500)}}),
    ),
    "schema that is deep": ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "schema of a long text": ("json_schema", '{"type": "string", "minLength": 1000000000}'),
    "schema of large counts": (
        "json_schema",
        '{"type": "array", "minItems": 100000000, "items": {"enum": [1]}}',
    ),
    "schema of products": (
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"type": "string", "pattern": f"^a{{{i}}}"}] * 8} for i in range(40)]}
        ),
    ),
    "schema of a hostile pattern": (
        "json_schema",
        '{"type": "string", "pattern": "^((a{1,300}){1,300}){1,300}$"}',
    ),
    "grammar of itself": ("grammar", "start: start"),
    "grammar from the left": ("grammar", 'start: start start "a" | start "b" | "a" |'),
    "grammar of all ways": ("grammar", "start: a a a a a a a a\na: b*\nb: c*\nc: /a*/ | c c | "),
    "grammar of a million": ("grammar", 'start: "a"~1000000'),
    "grammar of many rules": (
        "grammar",
        "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | "b"' for i in range(2500)) + '\nr2500: "c"',
    ),
    "grammar that imports": ("grammar", "%import .secrets.KEY\n%import common.ESCAPED_STRING\nstart: KEY"),
    "grammar of nothing": ("grammar", " "),
    "grammar of terminals": ("grammar", "start: A\nA: B B\nB: /x{1,2000}/ | A"),
}
