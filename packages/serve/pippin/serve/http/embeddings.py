"""OpenAI's /v1/embeddings."""

import asyncio
import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pippin.serve.call import Call
from pippin.serve.errors import InvalidRequestError, RequestError, Violation
from pippin.serve.frontend import Embedding, Frontend
from pippin.serve.http.body import read_object
from pippin.serve.http.disconnect import while_connected
from pippin.serve.http.fields import Fields, prompts_of, set_prompt
from pippin.serve.http.guard import caller_of
from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.http.problem import Problem
from pippin.serve.request_limits import RequestLimits
from pippin.serve.trace import trace_headers
from pippin.serve.validate import validate_embed
from pippin.v1 import inference_pb2 as pb

_FORMATS = ("float", "base64")


@dataclasses.dataclass(frozen=True)
class EmbedQuestion:
    """What a request asks for: a message for each of its inputs, and how the vectors are to be written."""

    requests: Sequence[pb.EmbedRequest]
    model: str | None
    as_base64: bool

    def path(self, i: int) -> str:
        """Of an input in the JSON."""
        return "input" if len(self.requests) == 1 else f"input[{i}]"


class EmbeddingsApi:
    """Answers with what a frontend makes. Errors are raised: `Guard` tells them."""

    def __init__(self, frontend: Frontend, limits: HttpLimits):
        self._frontend, self._limits = frontend, limits

    def routes(self) -> list[Route]:
        """What an application takes."""
        return [Route("/v1/embeddings", self.embeddings, methods=["POST"])]

    async def embeddings(self, request: Request) -> Response:
        question = embed_question(await read_object(request, self._limits))
        name = self._frontend.model.name
        if question.model not in (None, name):
            raise Problem(
                404,
                f"There is no model of this name that makes embeddings. This server has {name}.",
                param="model",
                code="model_not_found",
            )
        embeddings = await while_connected(self._embed(request, question), request.receive)
        body = await asyncio.to_thread(_answer, name, question, embeddings)
        return Response(body, media_type="application/json")

    async def _embed(self, request: Request, question: EmbedQuestion) -> list[Embedding]:
        calls, tenant = self._calls(question), caller_of(request).tenant
        headers = trace_headers(request.headers.items())
        path = lambda i, field: field if field == "timeout" else question.path(i)
        return await self._frontend.embed(calls, tenant, None, headers, path)

    def _calls(self, question: EmbedQuestion) -> list[Call]:
        model, limits = self._frontend.model, self._frontend.limits
        if len(question.requests) > limits.max_batch:
            raise RequestError(
                "input", f"has {len(question.requests)} texts; at most {limits.max_batch} are taken"
            )
        calls: list[Call] = []
        violations: list[Violation] = []
        for i, one in enumerate(question.requests):
            try:
                calls.append(validate_embed(one, model, limits))
            except InvalidRequestError as error:
                for v in error.violations:
                    own = v.field.removeprefix("token_ids.ids").removeprefix("text")
                    path = v.field if v.field in ("timeout", "priority") else question.path(i) + own
                    violations.append(Violation(path, v.description))
        if violations:
            raise InvalidRequestError(violations[: limits.max_violations])
        return calls


def embed_question(values: Mapping[str, Any]) -> EmbedQuestion:
    """Of the body of /v1/embeddings.

    Raises:
        InvalidRequestError: it is of another form; all that is wrong is told.
    """
    fields, common = Fields(values), pb.EmbedRequest()
    prompts = prompts_of(fields.take_any("input"))
    if prompts is None:
        fields.wrong("input", "must be a text, an array of token ids, or an array of such")
    elif len(prompts) > (most := RequestLimits().max_batch):  # before a message is made of each
        fields.wrong("input", f"has {len(prompts)} texts; at most {most} are taken")
        prompts = None
    model, form = fields.take("model", "a text"), fields.take("encoding_format", "a text")
    if form not in (None, *_FORMATS):
        fields.wrong("encoding_format", f"must be one of {', '.join(_FORMATS)}")
    fields.copy("priority", "an integer", common, "priority")
    fields.copy_seconds("timeout", common.timeout)
    requests = []
    for prompt in prompts or ():
        one = pb.EmbedRequest()
        one.CopyFrom(common)
        set_prompt(fields, "input", one, prompt)
        requests.append(one)
    fields.finish({"dimensions": ()}, frozenset({"user"}))
    if fields.violations:
        raise InvalidRequestError(fields.violations)
    return EmbedQuestion(requests, model, form == "base64")


def _answer(model: str, question: EmbedQuestion, embeddings: Sequence[Embedding]) -> bytes:
    prompt_tokens = sum(e.prompt_tokens for e in embeddings)
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(e.values, question.as_base64)}
            for i, e in enumerate(embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _written(values: np.ndarray, as_base64: bool) -> str | list[float]:
    return base64.b64encode(values.astype("<f4").tobytes()).decode() if as_base64 else values.tolist()
