import dataclasses
import math

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from pippin.serve.call import Chat, TokenIds
from pippin.serve.errors import InvalidRequestError, UnsupportedError
from pippin.serve.request_limits import RequestLimits
from pippin.serve.served_model import Message, OneOf, ServedModel
from pippin.serve.validate import validate_batch, validate_generate, validate_prompt
from pippin.v1 import inference_pb2 as pb

MODEL = ServedModel(
    name="bytes",
    vocab_size=256,
    context_length=100,
    encode=lambda text: list(text.encode()),
    encode_chat=lambda messages: [len(messages)],
    compile_constraint=lambda spec: None,  # pyright: ignore[reportArgumentType]
)
LIMITS = RequestLimits()


def call_of(model: ServedModel = MODEL, **fields):
    return validate_generate(pb.GenerateRequest(**fields), model, LIMITS)


def broken(**fields) -> list[str]:
    """The paths of what is wrong."""
    with pytest.raises(InvalidRequestError) as error:
        call_of(**fields)
    return [v.field for v in error.value.violations]


def test_what_is_not_set_has_the_documented_defaults():
    call = call_of(text="a")
    assert (call.prompt, call.max_tokens, call.n, call.priority, call.timeout_s) == ("a", None, 1, 0, None)
    assert not call.ignore_eos and call.stop_strings == () and call.constraint is None
    sampling = call.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert sampling.repetition_penalty == 1.0 and sampling.logprobs is None
    assert len(call.request_id) >= 16


def test_zero_is_not_the_default():
    sampling = call_of(text="a", temperature=0.0, logprobs=0).sampling
    assert (sampling.temperature, sampling.logprobs) == (0.0, 0)


def test_two_calls_without_a_seed_have_different_ones():
    assert call_of(text="a").sampling.seed != call_of(text="a").sampling.seed
    assert call_of(text="a", seed=3).sampling.seed == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**31 - 1),
        ("n", 0),
        ("n", 17),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", 1e-30),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -math.inf),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("seed", -1),
        ("logprobs", 21),
        ("priority", 101),
        ("request_id", ""),
        ("request_id", "a/b"),
        ("request_id", "a" * 129),
        ("cache_salt", "é" * 129),
        ("stop", ["a"] * 17),
        ("stop_token_ids", [1] * 17),
        ("logit_bias", {i: 0.0 for i in range(301)}),
        ("text", ""),
        ("text", "a" * ((1 << 20) + 1)),
        ("timeout", Duration(seconds=-1)),
        ("timeout", Duration(seconds=3601)),
        ("timeout", Duration(seconds=2**40)),
        ("timeout", Duration(seconds=1, nanos=-1)),
    ],
)
def test_a_value_out_of_its_range_is_named(field, value):
    assert field in broken(**{"text": "a", field: value})


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["é" * 129]}, "stop[0]"),
        ({"stop_token_ids": [1, 256]}, "stop_token_ids[1]"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias[-1]"),
        ({"logit_bias": {3: math.nan}}, "logit_bias[3]"),
        ({"logit_bias": {3: 101.0}}, "logit_bias[3]"),
        ({"choice": pb.Choice()}, "choice.choices"),
        ({"choice": pb.Choice(choices=["a", "a"])}, "choice.choices"),
        ({"choice": pb.Choice(choices=[""])}, "choice.choices"),
        ({"regex": ""}, "regex"),
        ({"json_schema": "x" * ((64 << 10) + 1)}, "json_schema"),
    ],
)
def test_an_element_out_of_its_range_is_named_by_its_path(fields, path):
    assert broken(text="a", **fields) == [path]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "prompt"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
        ({"token_ids": pb.TokenIds(ids=[0, -1])}, "token_ids.ids[1]"),
        ({"token_ids": pb.TokenIds(ids=[1] * 101)}, "token_ids.ids"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="root", content="")])}, "chat.messages[0].role"),
    ],
)
def test_a_prompt_that_is_none_is_named(fields, path):
    assert broken(**fields) == [path]


def test_a_conversation_of_too_many_messages_is_refused_before_they_are_looked_at():
    many = pb.Chat(messages=[pb.ChatMessage()] * 200_000)
    assert broken(chat=many) == ["chat.messages"]


def test_no_more_is_told_than_somebody_reads():
    assert (
        len(
            broken(
                text="a",
                stop_token_ids=[-1] * 16,
                stop=[""] * 16,
                logit_bias={-i: 0.0 for i in range(1, 200)},
            )
        )
        == 32
    )


def test_everything_that_is_wrong_is_told_at_once():
    assert broken(text="", max_tokens=0, top_p=2.0, stop=["", "a"], n=99) == [
        "text",
        "max_tokens",
        "n",
        "top_p",
        "stop[0]",
    ]


def test_the_paths_of_a_batch_begin_with_the_request():
    request = pb.GenerateBatchRequest(
        requests=[pb.GenerateRequest(text="a"), pb.GenerateRequest(text="", n=0)]
    )
    with pytest.raises(InvalidRequestError) as error:
        validate_batch(request, MODEL, LIMITS)
    assert [v.field for v in error.value.violations] == ["requests[1].text", "requests[1].n"]


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [pb.GenerateRequest(text="a")] * 65,
        [pb.GenerateRequest(text="a", n=16)] * 5,
        [pb.GenerateRequest(text="a", request_id="x")] * 2,
    ],
)
def test_a_batch_has_bounds_of_its_own(requests):
    with pytest.raises(InvalidRequestError) as error:
        validate_batch(pb.GenerateBatchRequest(requests=requests), MODEL, LIMITS)
    assert [v.field for v in error.value.violations] == ["requests"]


def test_prompts_and_constraints_arrive():
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    assert call_of(chat=chat).prompt == Chat((Message("user", "hi"),))
    assert call_of(token_ids=pb.TokenIds(ids=[1, 2])).prompt == TokenIds((1, 2))
    assert call_of(text="a", choice=pb.Choice(choices=["x", "y"])).constraint == OneOf(("x", "y"))
    assert validate_prompt(pb.CountTokensRequest(chat=chat), MODEL, LIMITS) == (
        Chat((Message("user", "hi"),)),
        "chat",
    )


@pytest.mark.parametrize(
    ("lacks", "fields", "capability"),
    [
        ({"encode": None}, {"text": "a"}, "CAPABILITY_TEXT"),
        ({"encode": None}, {"token_ids": pb.TokenIds(ids=[1]), "stop": ["a"]}, "CAPABILITY_TEXT"),
        ({"encode_chat": None}, {"chat": pb.Chat()}, "CAPABILITY_CHAT"),
        ({"compile_constraint": None}, {"text": "a", "regex": "a"}, "CAPABILITY_CONSTRAINTS"),
        ({}, {"text": "a", "adapter": "../x"}, "CAPABILITY_ADAPTERS"),
    ],
)
def test_what_the_server_cannot_do_is_said(lacks, fields, capability):
    with pytest.raises(UnsupportedError, match=capability):
        call_of(dataclasses.replace(MODEL, **lacks), **fields)


@given(st.binary(max_size=200))
def test_any_message_is_taken_or_refused(data):
    try:
        request = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    try:
        call = validate_generate(request, MODEL, LIMITS)
    except (InvalidRequestError, UnsupportedError):
        return
    assert call.prompt and 1 <= call.n <= LIMITS.max_n and math.isfinite(call.sampling.temperature)


_FLOATS = st.floats(width=32)
_INTS = st.integers(-(2**31), 2**31 - 1)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": _INTS,
            "n": _INTS,
            "temperature": _FLOATS,
            "top_k": _INTS,
            "top_p": _FLOATS,
            "min_p": _FLOATS,
            "repetition_penalty": _FLOATS,
            "frequency_penalty": _FLOATS,
            "presence_penalty": _FLOATS,
            "logit_bias": st.dictionaries(_INTS, _FLOATS, max_size=5),
            "stop": st.lists(st.text(max_size=5), max_size=3),
            "logprobs": _INTS,
            "priority": _INTS,
            "timeout": st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=_INTS),
        },
    )
)
def test_what_is_taken_is_in_range(fields):
    try:
        call = call_of(text="a", **fields)
    except InvalidRequestError as error:
        assert {v.field.split("[")[0] for v in error.violations} <= set(fields)
        return
    sampling = call.sampling
    assert sampling.temperature == 0 or 1e-3 <= sampling.temperature <= 10
    assert 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1 and sampling.top_k >= 0
    assert call.timeout_s is None or 0 < call.timeout_s <= LIMITS.max_timeout_s
    assert all(0 <= token < 256 and abs(bias) <= 100 for token, bias in sampling.logit_bias.items())
