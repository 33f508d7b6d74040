"""Outputs of the engine as OpenAI writes them: whole, and in chunks of a stream."""

import abc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pippin.serve.engine.request import FinishReason, Output, Sampled

Json = dict[str, Any]

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_LEAST_LOGPROB = -9999.0  # of a token that cannot be; JSON has no infinity


class Answer(abc.ABC):
    """Writes the answer to one request. Choices are numbered over all its prompts."""

    _prefix: str
    _object: str
    _chunk_object: str

    def __init__(self, request_id: str, model: str, token_bytes: Callable[[int], bytes], include_usage: bool):
        self._head: Json = {"id": self._prefix + request_id, "created": int(time.time()), "model": model}
        self._token_bytes, self._include_usage = token_bytes, include_usage
        self._usages: dict[int, Output] = {}  # choice -> its last output

    def whole(self, outputs: Sequence[Output], num_prompts: int) -> Json:
        """The answer to all prompts, whose completions are one after another."""
        choices = [self._choice(i, output) for i, output in enumerate(outputs)]
        usage = _usage(outputs, len(outputs) // num_prompts)
        return {**self._head, "object": self._object, "choices": choices, "usage": usage}

    def chunks(self, index: int, output: Output) -> Iterator[Json]:
        """What a stream tells of an output of a completion."""
        for choice in self._deltas(index, output):
            yield self._chunk([choice])
        if output.finish_reason is not None:
            self._usages[index] = output

    def last_chunk(self) -> Json | None:
        """What a stream ends with; None: nothing was asked for."""
        if not self._include_usage:
            return None
        return {**self._chunk([]), "usage": _usage(list(self._usages.values()), len(self._usages))}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self._chunk_object, "choices": choices}
        return {**chunk, "usage": None} if self._include_usage else chunk

    @abc.abstractmethod
    def _choice(self, index: int, output: Output) -> Json:
        """A whole completion."""

    @abc.abstractmethod
    def _deltas(self, index: int, output: Output) -> Iterator[Json]:
        """What is new of a completion."""


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    _prefix, _object, _chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._begun: set[int] = set()

    def _choice(self, index: int, output: Output) -> Json:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(output)}

    def _deltas(self, index: int, output: Output) -> Iterator[Json]:
        delta: Json = {"content": output.text} if output.text or output.tokens else {}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": "", **delta}
        yield {"index": index, "delta": delta, **self._rest(output)}

    def _rest(self, output: Output) -> Json:
        told = [self._logprob(s.token, s.logprob, s) for s in output.tokens if s.logprob is not None]
        return {
            "logprobs": {"content": told, "refusal": None} if told else None,
            "finish_reason": _reason(output),
        }

    def _logprob(self, token: int, logprob: float, sampled: Sampled | None = None) -> Json:
        data = self._token_bytes(token)
        found: Json = {"token": _text(data), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}
        if sampled is not None:
            found["top_logprobs"] = [self._logprob(*one) for one in sampled.top]
        return found


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    _prefix, _object, _chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._offsets: dict[int, int] = {}  # choice -> characters of the tokens that were told

    def _choice(self, index: int, output: Output) -> Json:
        logprobs = self._logprobs(index, [s for s in output.tokens if s.logprob is not None])
        return {"index": index, "text": output.text, "logprobs": logprobs, "finish_reason": _reason(output)}

    def _deltas(self, index: int, output: Output) -> Iterator[Json]:
        yield self._choice(index, output)

    def _logprobs(self, index: int, tokens: Sequence[Sampled]) -> Json | None:
        if not tokens:
            return None
        texts, offsets = [_text(self._token_bytes(s.token)) for s in tokens], []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(s.logprob or 0.0, _LEAST_LOGPROB) for s in tokens],
            "top_logprobs": [
                {_text(self._token_bytes(token)): max(logprob, _LEAST_LOGPROB) for token, logprob in s.top}
                for s in tokens
            ],
            "text_offset": offsets,
        }


def _reason(output: Output) -> str | None:
    return None if output.finish_reason is None else _REASONS.get(output.finish_reason)


def _usage(outputs: Sequence[Output], n: int) -> Json:
    """Of completions, n to a prompt: each prompt counts once."""
    firsts = outputs[::n] if n else []
    prompt, output = (sum(o.usage.prompt_tokens for o in firsts), sum(o.usage.output_tokens for o in outputs))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(o.usage.cached_tokens for o in firsts)},
    }


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
