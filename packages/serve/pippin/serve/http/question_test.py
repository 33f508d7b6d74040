import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.serve.errors import InvalidRequestError
from pippin.serve.http.question import chat_question, completion_question

HI = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return chat_question({"messages": HI, **fields})


def complete(**fields):
    return completion_question({"prompt": "hi", **fields})


def wrong(ask, **fields) -> list[str]:
    """The paths of what is wrong."""
    with pytest.raises(InvalidRequestError) as error:
        ask(**fields)
    return [v.field for v in error.value.violations]


def test_a_chat_becomes_the_message_of_grpc():
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        # As the client's library gives back what it got.
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
    ]
    (request,) = chat_question({"messages": messages}).requests
    assert [(m.role, m.content) for m in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "ab"),
        ("assistant", "c"),
    ]


@pytest.mark.parametrize("ask", [chat, complete])
def test_fields_arrive_and_those_that_are_not_set_stay_so(ask):
    (request,) = ask().requests
    assert not any(
        request.HasField(f) for f in ("temperature", "n", "seed", "max_tokens", "logprobs", "timeout")
    )
    (request,) = ask(
        max_tokens=3,
        temperature=0,
        n=2,
        seed=7,
        stop="x",
        stop_token_ids=[1],
        logit_bias={"5": -3},
        timeout=1.5,
    ).requests
    assert (request.max_tokens, request.temperature, request.n, request.seed) == (3, 0.0, 2, 7)
    assert (
        request.HasField("temperature")
        and list(request.stop) == ["x"]
        and dict(request.logit_bias) == {5: -3}
    )
    assert (request.timeout.seconds, request.timeout.nanos) == (1, 500_000_000)


def test_null_is_not_set_and_what_says_nothing_is_taken():
    question = chat(
        model="m",
        user="u",
        metadata={"a": "b"},
        tools=None,
        tool_choice="none",
        n=None,
        store=False,
        stop=None,
    )
    assert question.model == "m" and not question.stream


@pytest.mark.parametrize(
    ("ask", "fields", "path"),
    [
        (chat, {"tools": [{"type": "function"}]}, "tools"),
        (chat, {"made_up": 1}, "made_up"),
        (chat, {"temperature": "1"}, "temperature"),
        (chat, {"temperature": True}, "temperature"),
        (chat, {"n": 1.0}, "n"),
        (chat, {"n": 2**40}, "n"),
        (chat, {"seed": 2**70}, "seed"),
        (chat, {"stream": "yes"}, "stream"),
        (chat, {"stop": ["a", 1]}, "stop"),
        (chat, {"stop": "\ud800"}, "stop"),
        (chat, {"logit_bias": {"x": 1}}, "logit_bias['x']"),
        (chat, {"logit_bias": {"1": "x"}}, "logit_bias['1']"),
        (chat, {"timeout": 1e300}, "timeout"),
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
        (chat, {"response_format": {"type": "xml"}}, "response_format.type"),
        (chat, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (chat, {"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        (chat, {"structured_outputs": {"regex": "a", "json": "{}"}}, "structured_outputs"),
        (chat, {"messages": "hi"}, "messages"),
        (chat, {"messages": [3]}, "messages[0]"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"content": "a"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        (complete, {"prompt": None}, "prompt"),
        (complete, {"prompt": [1, "a"]}, "prompt"),
        (complete, {"prompt": [2**40]}, "prompt"),
        (complete, {"prompt": ["a", "b"], "stream": True}, "stream"),
        (complete, {"echo": True}, "echo"),
        (complete, {"best_of": 3}, "best_of"),
        (complete, {"messages": HI}, "messages"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(ask, fields, path):
    assert wrong(ask, **fields) == [path]


def test_all_that_is_wrong_is_told_at_once():
    assert wrong(chat, n="a", stop=3, tools=[1]) == ["n", "stop", "tools"]


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}},
            "json_schema",
            '{"a": 1}',
        ),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": {"a": 1}}}, "json_schema", '{"a": 1}'),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
def test_constraints_arrive(fields, field, value):
    (request,) = chat(**fields).requests
    assert request.WhichOneof("constraint") == field
    assert field is None or getattr(request, field) == value


def test_prompts_are_texts_or_ids_one_or_several():
    assert [r.text for r in complete(prompt=["a", "b"]).requests] == ["a", "b"]
    assert [list(r.token_ids.ids) for r in complete(prompt=[1, 2]).requests] == [[1, 2]]
    assert [list(r.token_ids.ids) for r in complete(prompt=[[1], [2]]).requests] == [[1], [2]]


def test_paths_of_the_message_are_told_as_those_of_the_json():
    assert chat(max_completion_tokens=1).path("max_tokens") == "max_completion_tokens"
    assert chat(max_tokens=1).path("max_tokens") == "max_tokens"
    assert chat().path("chat.messages[2].role") == "messages[2].role"
    assert complete().path("text") == "prompt"
    assert complete().path("stop[1]") == "stop[1]"
    assert complete(prompt=["a", "b"]).path("requests[1].text") == "prompt[1]"
    assert complete(prompt=["a", "b"]).path("requests[1].n") == "n"


_NAMES = [
    "messages",
    "prompt",
    "n",
    "stop",
    "logit_bias",
    "stream",
    "response_format",
    "logprobs",
    "timeout",
    "tools",
]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab5é\ud800", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES))
def test_any_object_is_taken_or_refused(values):
    for ask in (chat_question, completion_question):
        try:
            ask(values)
        except InvalidRequestError as error:
            assert all(v.field and v.description for v in error.violations)
