"""Messages of pippin.v1 into what the server serves; every rule that one breaks is told at once."""

import math
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from pippin.serve.call import Call, Chat, Prompt, TokenIds
from pippin.serve.engine.request import Sampling
from pippin.serve.errors import InvalidRequestError, UnsupportedError, Violation
from pippin.serve.request_limits import RequestLimits
from pippin.serve.served_model import ConstraintSpec, Grammar, JsonSchema, Message, OneOf, Regex, ServedModel
from pippin.v1 import inference_pb2 as pb

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ROLES = ("system", "user", "assistant")
_MAX_SEED = 2**63 - 1
_MAX_SALT_BYTES = 256
_MIN_TEMPERATURE = 1e-3  # logits divided by less overflow


class Validator:
    """Makes calls of messages, and gathers what is wrong with them."""

    def __init__(self, model: ServedModel, limits: RequestLimits, path: str = ""):
        self.violations: list[Violation] = []
        self._model, self._limits, self._path = model, limits, path

    def generate(self, request: pb.GenerateRequest) -> Call:
        """The call of a request; only to be used where nothing is wrong."""
        limits = self._limits
        if request.HasField("adapter") and self._model.adapters is None:
            raise UnsupportedError(
                "This server has no adapters (GetModel names no CAPABILITY_ADAPTERS). Leave `adapter` out."
            )
        prompt, prompt_field = self._prompt(request, "prompt")
        constraint, constraint_field = self._constraint(request)
        return Call(
            request_id=self._request_id(request),
            prompt=prompt,
            prompt_field=prompt_field,
            max_tokens=self._int(request, "max_tokens", 1, limits.max_tokens),
            n=self._int(request, "n", 1, limits.max_n, 1),
            sampling=self._sampling(request),
            stop_strings=self._stop(request.stop),
            stop_ids=frozenset(self._ids("stop_token_ids", request.stop_token_ids, limits.max_stop)),
            ignore_eos=request.ignore_eos,
            constraint=constraint,
            constraint_field=constraint_field,
            priority=self._int(request, "priority", -100, 100, 0),
            cache_salt=self._salt(request.cache_salt),
            timeout_s=self._timeout(request),
            adapter=request.adapter if request.HasField("adapter") else None,
        )

    def embed(self, request: pb.EmbedRequest) -> Call:
        """The call of a request for a vector; only to be used where nothing is wrong."""
        prompt, field = self._prompt(request, "input")
        return Call(
            request_id=secrets.token_hex(12),
            prompt=prompt,
            prompt_field=field,
            priority=self._int(request, "priority", -100, 100, 0),
            timeout_s=self._timeout(request),
            embeds=True,
        )

    def prompt(self, request: pb.TokenizeRequest | pb.CountTokensRequest) -> tuple[Prompt, str]:
        """The input of a request, and the path of its field."""
        return self._prompt(request, "input")

    def require(self, holds: bool, field: str, rule: str) -> None:
        """Notes a rule that is broken."""
        if not holds and len(self.violations) < self._limits.max_violations:
            self.violations.append(Violation(self._path + field, rule))

    def check(self) -> None:
        """Raises InvalidRequestError where anything is wrong."""
        if self.violations:
            raise InvalidRequestError(self.violations)

    def _request_id(self, request: pb.GenerateRequest) -> str:
        if not request.HasField("request_id"):
            return secrets.token_hex(12)
        found = _REQUEST_ID.fullmatch(request.request_id)
        self.require(bool(found), "request_id", "must be 1 to 128 letters, digits, and any of -_.:")
        return request.request_id

    def _prompt(self, request: Any, oneof: str) -> tuple[Prompt, str]:
        field = request.WhichOneof(oneof)
        if field is None:
            choices = ", ".join(f.name for f in request.DESCRIPTOR.oneofs_by_name[oneof].fields)
            self.require(False, oneof, f"is not set. Set one of {choices}")
            return "", oneof
        if field == "text":
            self._require_text(field)
            self.require(bool(request.text), field, "must not be empty")
            self._require_bytes(field, [request.text])
            return request.text, field
        if field == "chat":
            return self._chat(request.chat), field
        ids = request.token_ids.ids
        self.require(len(ids) > 0, "token_ids.ids", "must hold at least one id")
        return TokenIds(tuple(self._ids("token_ids.ids", ids, self._model.context_length))), "token_ids.ids"

    def _chat(self, chat: pb.Chat) -> Chat:
        self._require_text("chat")
        if self._model.encode is not None and self._model.encode_chat is None:
            raise UnsupportedError(
                "The model has no chat template (GetModel names no CAPABILITY_CHAT). Send `text` instead."
            )
        count, most = len(chat.messages), self._limits.max_messages
        self.require(0 < count <= most, "chat.messages", f"must hold 1 to {most} messages, not {count}")
        if count > most:
            return Chat(())  # before each is looked at
        for i, message in enumerate(chat.messages):
            rule = f"must be one of {', '.join(_ROLES)}"
            self.require(message.role in _ROLES, f"chat.messages[{i}].role", rule)
        self._require_bytes("chat.messages", [m.content for m in chat.messages])
        return Chat(tuple(Message(m.role, m.content) for m in chat.messages))

    def _require_text(self, field: str) -> None:
        if self._model.encode is None:
            raise UnsupportedError(
                f"The model has no tokenizer (GetModel names no CAPABILITY_TEXT), so `{field}` cannot be used. "
                "Send token_ids instead."
            )

    def _require_bytes(self, field: str, texts: Iterable[str]) -> None:
        size, most = _num_bytes(texts), self._limits.max_prompt_bytes
        self.require(size <= most, field, f"has {size} bytes; at most {most} are taken")

    def _sampling(self, request: pb.GenerateRequest) -> Sampling:
        limits = self._limits
        temperature = self._float(request, "temperature", 0.0, 10.0, 1.0)
        self.require(
            not 0 < temperature < _MIN_TEMPERATURE, "temperature", f"must be 0 or at least {_MIN_TEMPERATURE}"
        )
        top_p = self._float(request, "top_p", 0.0, 1.0, 1.0)
        self.require(top_p > 0, "top_p", "must be more than 0")
        seed = self._int(request, "seed", 0, _MAX_SEED)
        return Sampling(
            logit_bias=self._logit_bias(request),
            repetition_penalty=self._float(request, "repetition_penalty", 0.01, 100.0, 1.0),
            frequency_penalty=self._float(request, "frequency_penalty", -2.0, 2.0, 0.0),
            presence_penalty=self._float(request, "presence_penalty", -2.0, 2.0, 0.0),
            temperature=temperature,
            top_k=self._int(request, "top_k", 0, 2**31 - 1, 0),
            top_p=top_p,
            min_p=self._float(request, "min_p", 0.0, 1.0, 0.0),
            seed=secrets.randbits(63) if seed is None else seed,
            logprobs=self._int(request, "logprobs", 0, limits.max_logprobs),
        )

    def _logit_bias(self, request: pb.GenerateRequest) -> dict[int, float]:
        bias, most = request.logit_bias, self._limits.max_logit_bias
        self.require(len(bias) <= most, "logit_bias", f"has {len(bias)} entries; at most {most} are taken")
        for token in sorted(bias)[:most]:
            self._require_id(f"logit_bias[{token}]", token)
            self._require_range(f"logit_bias[{token}]", bias[token], -100.0, 100.0)
        return dict(bias)

    def _stop(self, stop: Any) -> tuple[str, ...]:
        limits = self._limits
        self.require(
            len(stop) <= limits.max_stop,
            "stop",
            f"has {len(stop)} texts; at most {limits.max_stop} are taken",
        )
        if stop:
            self._require_text("stop")
        for i, text in enumerate(stop[: limits.max_stop]):
            self.require(bool(text), f"stop[{i}]", "must not be empty")
            size = _num_bytes([text])
            rule = f"has {size} bytes; at most {limits.max_stop_bytes} are taken"
            self.require(size <= limits.max_stop_bytes, f"stop[{i}]", rule)
        return tuple(stop)

    def _constraint(self, request: pb.GenerateRequest) -> tuple[ConstraintSpec | None, str]:
        field = request.WhichOneof("constraint")
        if field is None:
            return None, ""
        if self._model.compile_constraint is None:
            raise UnsupportedError(
                f"This server has no constraints (GetModel names no CAPABILITY_CONSTRAINTS). Leave `{field}` out."
            )
        choices, limits = list(request.choice.choices), self._limits
        if field == "choice":
            self.require(
                1 <= len(choices) <= limits.max_choices,
                "choice.choices",
                f"must hold 1 to {limits.max_choices} texts",
            )
            self.require(all(choices), "choice.choices", "must not hold an empty text")
            self.require(len(set(choices)) == len(choices), "choice.choices", "must not hold a text twice")
        texts = choices if field == "choice" else [getattr(request, field)]
        size, most = _num_bytes(texts), limits.max_constraint_bytes
        self.require(size <= most, field, f"has {size} bytes; at most {most} are taken")
        self.require(field == "choice" or bool(texts[0]), field, "must not be empty")
        made: dict[str, ConstraintSpec] = {
            "json_schema": JsonSchema(request.json_schema),
            "regex": Regex(request.regex),
            "choice": OneOf(tuple(choices)),
            "grammar": Grammar(request.grammar),
        }
        return made[field], field

    def _salt(self, salt: str) -> str:
        self.require(
            _num_bytes([salt]) <= _MAX_SALT_BYTES, "cache_salt", f"must have {_MAX_SALT_BYTES} bytes at most"
        )
        return salt

    def _timeout(self, request: pb.GenerateRequest | pb.EmbedRequest) -> float | None:
        if not request.HasField("timeout"):
            return None
        seconds = request.timeout.seconds + request.timeout.nanos * 1e-9
        most = self._limits.max_timeout_s
        self.require(
            0 < seconds <= most and 0 <= request.timeout.nanos < 10**9,
            "timeout",
            f"must be more than 0 s and at most {most:g} s",
        )
        return seconds

    def _int(
        self,
        request: pb.GenerateRequest | pb.EmbedRequest,
        field: Any,
        least: int,
        most: int,
        default: int | None = None,
    ) -> Any:
        if not request.HasField(field):
            return default
        value = getattr(request, field)
        self._require_range(field, value, least, most)
        return value

    def _float(
        self, request: pb.GenerateRequest, field: Any, least: float, most: float, default: float
    ) -> float:
        if not request.HasField(field):
            return default
        value = getattr(request, field)
        self._require_range(field, value, least, most)
        return value

    def _require_range(self, field: str, value: float, least: float, most: float) -> None:
        # A NaN is in no range.
        said = f"is {value:g}" if math.isfinite(value) else f"is {value}"
        self.require(least <= value <= most, field, f"{said}; must be from {least} to {most}")

    def _require_id(self, field: str, token: int) -> None:
        self.require(
            0 <= token < self._model.vocab_size,
            field,
            f"token id {token} is none of this model's, which are from 0 to {self._model.vocab_size - 1}",
        )

    def _ids(self, field: str, ids: Any, most: int) -> Iterator[int]:
        self.require(len(ids) <= most, field, f"holds {len(ids)} ids; at most {most} are taken")
        for i, token in enumerate(ids[:most]):
            if not 0 <= token < self._model.vocab_size:
                self._require_id(f"{field}[{i}]", token)
            yield token


def validate_generate(request: pb.GenerateRequest, model: ServedModel, limits: RequestLimits) -> Call:
    """The call that a message asks for.

    Raises:
        InvalidRequestError: it breaks rules; all of them are told.
        UnsupportedError: it asks for what this model or server cannot do.
    """
    validator = Validator(model, limits)
    call = validator.generate(request)
    validator.check()
    return call


def validate_batch(request: pb.GenerateBatchRequest, model: ServedModel, limits: RequestLimits) -> list[Call]:
    """The calls that a batch asks for; errors as `validate_generate`'s, with paths such as `requests[0].n`."""
    whole = Validator(model, limits)
    num = len(request.requests)
    whole.require(1 <= num <= limits.max_batch, "requests", f"must hold 1 to {limits.max_batch} requests")
    whole.check()
    calls = []
    for i, one in enumerate(request.requests):
        validator = Validator(model, limits, f"requests[{i}].")
        calls.append(validator.generate(one))
        whole.violations += validator.violations
    total, ids = sum(call.n for call in calls), [call.request_id for call in calls]
    whole.require(
        total <= limits.max_batch, "requests", f"ask for {total} completions; at most {limits.max_batch}"
    )
    whole.require(len(set(ids)) == num, "requests", "must not have the same request_id twice")
    whole.check()
    return calls


def validate_embed(request: pb.EmbedRequest, model: ServedModel, limits: RequestLimits) -> Call:
    """The call that a message asks for; errors as `validate_generate`'s."""
    validator = Validator(model, limits)
    call = validator.embed(request)
    validator.check()
    return call


def validate_prompt(
    request: pb.TokenizeRequest | pb.CountTokensRequest, model: ServedModel, limits: RequestLimits
) -> tuple[Prompt, str]:
    """What to tokenize and the path of its field; errors as `validate_generate`'s."""
    validator = Validator(model, limits)
    prompt = validator.prompt(request)
    validator.check()
    return prompt


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)
