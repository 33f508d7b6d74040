"""The JSON of a request as the message that gRPC takes: the rules of what it may ask for are written once."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from pippin.serve.errors import InvalidRequestError, Violation
from pippin.serve.http.fields import Fields, is_text, prompts_of, set_prompt
from pippin.serve.request_limits import RequestLimits
from pippin.v1 import inference_pb2 as pb

# Fields that are the same in the message.
_SAME = {
    "temperature": "a number",
    "top_p": "a number",
    "top_k": "an integer",
    "min_p": "a number",
    "presence_penalty": "a number",
    "frequency_penalty": "a number",
    "repetition_penalty": "a number",
    "n": "an integer",
    "seed": "an integer",
    "ignore_eos": "true or false",
    "priority": "an integer",
    "cache_salt": "a text",
}
# Say who asks or what for, and change no answer: read by nobody.
_HARMLESS = frozenset({"user", "safety_identifier", "prompt_cache_key", "metadata"})
# Fields of OpenAI's API that this server does not have -> their values that ask for nothing, beside null.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
}
# The same, of a message of a chat.
_NOTHING_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
    "refusal": ("",),
}
# Of all prompts with what they share: what gRPC takes as one message.
_MAX_MERGED_BYTES = 4 << 20
_TOKEN = re.compile(r"-?[0-9]{1,10}")
_ANY_OBJECT = '{"type": "object"}'
_OF_REQUEST = re.compile(r"requests\[(\d+)\]\.(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a request asks for: a message for each of its prompts, and how the answer is to be written."""

    requests: list[pb.GenerateRequest]
    model: str | None
    stream: bool
    include_usage: bool
    names: Mapping[str, str]  # a path in the message -> its path in the JSON

    def path(self, path: str) -> str:
        """Where in the JSON a field of the message is."""
        at = _OF_REQUEST.fullmatch(path)
        index, path = (at[1], at[2]) if at else (None, path)
        for ours, theirs in self.names.items():
            if path == ours or (path.startswith(ours) and path[len(ours)] in ".["):
                several = theirs == "prompt" and index is not None
                return theirs + (f"[{index}]" if several else "") + path[len(ours) :]
        return path


def chat_question(values: Mapping[str, Any]) -> Question:
    """Of the body of /v1/chat/completions.

    Raises:
        InvalidRequestError: it is of another form; all that is wrong is told.
    """
    fields, request = Fields(values), pb.GenerateRequest()
    request.chat.SetInParent()
    messages = fields.take("messages", "an array", required=True) or ()
    # One more than are taken, for the rules to find.
    for i, message in enumerate(messages[: RequestLimits().max_messages + 1]):
        if isinstance(message, dict):
            of_message = Fields(message, fields.violations, f"messages[{i}].")
            _chat_message(of_message, request.chat.messages.add())
        else:
            fields.wrong(f"messages[{i}]", "must be an object")
    if fields.take("logprobs", "true or false"):
        request.logprobs = 0
        fields.copy("top_logprobs", "an integer", request, "logprobs")
    elif fields.take_any("top_logprobs"):
        fields.wrong("top_logprobs", "needs `logprobs: true`")
    fields.copy("max_tokens", "an integer", request, "max_tokens")
    newer = values.get("max_completion_tokens") is not None
    fields.copy("max_completion_tokens", "an integer", request, "max_tokens")
    names = {
        "chat.messages": "messages",
        "chat": "messages",
        "logprobs": "top_logprobs",
        "max_tokens": "max_completion_tokens" if newer else "max_tokens",
    }
    return _question(fields, request, [request], names)


def completion_question(values: Mapping[str, Any]) -> Question:
    """Of the body of /v1/completions; errors as `chat_question`'s."""
    fields, request = Fields(values), pb.GenerateRequest()
    prompts = prompts_of(fields.take_any("prompt"))
    if prompts is None:
        fields.wrong("prompt", "must be a text, an array of token ids, or an array of such")
    elif len(prompts) > (most := RequestLimits().max_batch):
        fields.wrong("prompt", f"holds {len(prompts)} prompts; at most {most} are taken")
        prompts = None
    fields.copy("logprobs", "an integer", request, "logprobs")
    fields.copy("max_tokens", "an integer", request, "max_tokens")
    if fields.take("best_of", "an integer") not in (None, values.get("n") or 1):
        fields.wrong("best_of", "is not supported by this server. Leave it out.")
    requests = [pb.GenerateRequest() for _ in prompts or ()]
    for i, (one, prompt) in enumerate(zip(requests, prompts or (), strict=True)):
        set_prompt(fields, "prompt" if len(requests) == 1 else f"prompt[{i}]", one, prompt)
    names = {"text": "prompt", "token_ids.ids": "prompt"}
    question = _question(fields, request, requests, names)
    if len(requests) > 1 and question.stream:
        raise InvalidRequestError(
            [Violation("stream", "needs a single prompt. Send each as a request of its own.")]
        )
    return question


def _question(
    fields: Fields, request: pb.GenerateRequest, requests: list[pb.GenerateRequest], names: Mapping[str, str]
) -> Question:
    """Takes what is the same in both, and gives it to all requests."""
    for name, kind in _SAME.items():
        fields.copy(name, kind, request, name)
    stop = fields.take_any("stop")
    fields.extend("stop", [stop] if isinstance(stop, str) else stop, "a text", request.stop)
    fields.extend("stop_token_ids", fields.take_any("stop_token_ids"), "an integer", request.stop_token_ids)
    for token, bias in (fields.take("logit_bias", "an object") or {}).items():
        try:
            request.logit_bias[int(token) if _TOKEN.fullmatch(token) else token] = bias
        except (TypeError, ValueError, OverflowError):
            fields.wrong(f"logit_bias[{token[:20]!r}]", "must be a number under a token id")
    fields.copy_seconds("timeout", request.timeout)
    names = {**names, **_constraint(fields, request), "adapter": "model"}
    model = fields.take("model", "a text")
    stream = bool(fields.take("stream", "true or false"))
    include_usage = _include_usage(fields, stream)
    fields.finish(_NOTHING, _HARMLESS)
    if fields.violations:
        raise InvalidRequestError(fields.violations)
    several = [one for one in requests if one is not request]
    if len(several) > 1 and len(several) * request.ByteSize() > _MAX_MERGED_BYTES:
        rule = f"holds {len(several)} prompts, for each of which the rest of the request is copied, and that is too large"
        raise InvalidRequestError([Violation("prompt", f"{rule}. Send them one by one.")])
    for one in several:
        one.MergeFrom(request)
    return Question(requests, model, stream, include_usage, names)


def _chat_message(fields: Fields, message: pb.ChatMessage) -> None:
    role = fields.take("role", "a text", required=True)
    if role is not None:
        message.role = "system" if role == "developer" else role  # its newer name
    content = fields.take_any("content")
    if is_text(content):
        message.content = content
    elif isinstance(content, list):
        message.content = "".join(_part(fields, i, part) for i, part in enumerate(content))
    else:
        fields.wrong("content", "must be a text, or an array of texts' parts")
    fields.finish(_NOTHING_OF_MESSAGE, frozenset())


def _part(fields: Fields, i: int, part: Any) -> str:
    """The text of a part of a message."""
    of_part = Fields(part if isinstance(part, dict) else {}, fields.violations, f"{fields.path}content[{i}].")
    kind = of_part.take("type", "a text", required=True)
    if kind is not None and kind != "text":
        of_part.wrong("type", f"is {kind[:20]!r}; this server takes parts of type text only")
        return ""
    text = of_part.take("text", "a text", required=kind is not None)
    of_part.finish({}, frozenset())
    return text or ""


def _constraint(fields: Fields, request: pb.GenerateRequest) -> dict[str, str]:
    """Sets what the output must be. The result: where it stood."""
    names = {}
    form = fields.nested("response_format")
    if form is not None:
        kind = form.take("type", "a text", required=True)
        if kind == "json_object":
            request.json_schema = _ANY_OBJECT
            names["json_schema"] = "response_format"
        elif kind == "json_schema" and (inner := form.nested("json_schema", required=True)) is not None:
            schema = inner.take("schema", "an object", required=True)
            request.json_schema = json.dumps(schema)
            names["json_schema"] = "response_format.json_schema.schema"
            inner.finish({}, frozenset({"name", "strict", "description"}))
        elif kind not in (None, "text", "json_schema"):
            form.wrong("type", "must be text, json_object or json_schema")
        form.finish({}, frozenset())
    if (outputs := fields.nested("structured_outputs")) is None:
        return names
    if names:
        fields.wrong("structured_outputs", "must not be set together with response_format")
    if len(outputs) != 1:
        fields.wrong("structured_outputs", "must have one of json, regex, choice and grammar")
    schema = outputs.take_any("json")
    if schema is not None:
        request.json_schema = schema if is_text(schema) else json.dumps(schema)
    outputs.copy("regex", "a text", request, "regex")
    outputs.copy("grammar", "a text", request, "grammar")
    choices = outputs.take_any("choice")
    if choices is not None:
        outputs.extend("choice", choices, "a text", request.choice.choices)
    outputs.finish({}, frozenset())
    given = request.WhichOneof("constraint")
    if given is None:
        return {}
    path = f"structured_outputs.{'json' if given == 'json_schema' else given}"
    return {f"{given}.choices": path, given: path}


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.nested("stream_options")
    if options is None:
        return False
    if not stream:
        fields.wrong("stream_options", "needs `stream: true`")
    wanted = options.take("include_usage", "true or false")
    options.finish({"include_obfuscation": (False,)}, frozenset())
    return bool(wanted)
