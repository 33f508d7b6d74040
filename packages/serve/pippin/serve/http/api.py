"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pippin.serve.call import Call
from pippin.serve.endings import SUCCESS
from pippin.serve.engine.request import Output
from pippin.serve.errors import InvalidRequestError, RequestError, UnfinishedError, Violation
from pippin.serve.frontend import Frontend, Generation, collect
from pippin.serve.http.answer import Answer, ChatAnswer, CompletionAnswer
from pippin.serve.http.body import read_object
from pippin.serve.http.disconnect import while_connected
from pippin.serve.http.event_stream import EventStream
from pippin.serve.http.guard import caller_of
from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.http.problem import Problem
from pippin.serve.http.question import Question, chat_question, completion_question
from pippin.serve.trace import trace_headers
from pippin.serve.validate import validate_batch, validate_generate
from pippin.v1 import inference_pb2 as pb

_ID_HEADER = "x-request-id"


class OpenAIApi:
    """Answers with what a frontend makes. Errors are raised: `Guard` tells them."""

    def __init__(self, frontend: Frontend, limits: HttpLimits):
        self._frontend, self._limits = frontend, limits
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """What an application takes."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def models(self, _: Request) -> Response:
        adapters = map(self._as_model, self._adapters())
        return JSONResponse({"object": "list", "data": [self._as_model(None), *adapters]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._as_model(self._adapter(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, completion_question, CompletionAnswer)

    async def chat(self, request: Request) -> Response:
        if self._frontend.model.encode_chat is None:
            raise Problem(400, "The model has no chat template. Use /v1/completions.", code="unsupported")
        return await self._answer(request, chat_question, ChatAnswer)

    async def _answer(
        self, request: Request, ask: Callable[[Mapping[str, Any]], Question], make: type[Answer]
    ) -> Response:
        model = self._frontend.model
        if model.encode is None:
            raise Problem(400, "The model has no tokenizer. Send token ids over gRPC.", code="unsupported")
        question = ask(await read_object(request, self._limits))
        adapter = self._adapter(question.model)
        if adapter is not None:
            for one in question.requests:
                one.adapter = adapter
        request_id = request.headers.get(_ID_HEADER) or secrets.token_hex(12)
        calls = self._calls(question, request_id)
        answer = make(
            request_id, adapter or model.name, self._frontend.engine.token_bytes, question.include_usage
        )
        if question.stream:
            return EventStream(self._stream(request, question, calls[0], answer), request_id)
        outputs = await while_connected(self._collect(request, question, calls), request.receive)
        # Megabytes, where many log-probabilities are asked for.
        body = await asyncio.to_thread(_json, lambda: answer.whole(outputs, len(calls)))
        return Response(body, media_type="application/json", headers={_ID_HEADER: request_id})

    def _calls(self, question: Question, request_id: str) -> Sequence[Call]:
        model, limits, requests = self._frontend.model, self._frontend.limits, question.requests
        if model.compile_constraint is None and any(r.WhichOneof("constraint") for r in requests):
            raise Problem(
                400,
                "This server cannot hold the model to a format. Leave it out.",
                param="response_format",
                code="unsupported",
            )
        for i, one in enumerate(requests):
            one.request_id = request_id if len(requests) == 1 else f"{request_id}.{i}"
        with _named(question):
            if len(requests) == 1:
                return [validate_generate(requests[0], model, limits)]
            return validate_batch(pb.GenerateBatchRequest(requests=requests), model, limits)

    async def _collect(self, request: Request, question: Question, calls: Sequence[Call]) -> list[Output]:
        """All completions of all calls.

        Raises:
            UnfinishedError: one of them failed.
        """
        generations = await self._generate(request, question, calls)
        async with contextlib.AsyncExitStack() as stack:
            for generation in generations:
                await stack.enter_async_context(generation)
            outputs = [
                output for found in await asyncio.gather(*map(collect, generations)) for output in found
            ]
        for output in outputs:
            assert output.finish_reason is not None, "the last output"
            if output.finish_reason not in SUCCESS:
                raise UnfinishedError(output.finish_reason)
        return outputs

    async def _stream(
        self, request: Request, question: Question, call: Call, answer: Answer
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a call's completions.

        Raises:
            UnfinishedError: one of them failed; the others were told to their ends.
        """
        (generation,) = await self._generate(request, question, [call])
        failed = None
        async with generation:
            async for index, output in generation:
                if output.finish_reason is not None and output.finish_reason not in SUCCESS:
                    failed = failed or output.finish_reason
                    output = dataclasses.replace(output, finish_reason=None)
                    if not output.tokens:
                        continue
                for chunk in answer.chunks(index, output):
                    yield chunk
        if failed is not None:
            raise UnfinishedError(failed)
        if (last := answer.last_chunk()) is not None:
            yield last

    async def _generate(
        self, request: Request, question: Question, calls: Sequence[Call]
    ) -> list[Generation]:
        tenant, headers = caller_of(request).tenant, trace_headers(request.headers.items())
        with _named(question):
            return await self._frontend.generate_all(calls, tenant, None, headers)

    def _adapters(self) -> list[str]:
        """The names of those that are loaded, under which they are models here, as with other servers."""
        adapters = self._frontend.model.adapters
        return [] if adapters is None else [loaded.adapter.name for loaded in adapters.loaded()]

    def _adapter(self, name: str | None) -> str | None:
        """The adapter that is meant by the name of a model; None: the model itself.

        Raises:
            Problem: another model is meant than is served.
        """
        if name in (None, self._frontend.model.name):
            return None
        if name not in self._adapters():
            names = ", ".join([self._frontend.model.name, *self._adapters()])
            raise Problem(
                404,
                f"There is no model of this name. This server has {names}.",
                param="model",
                code="model_not_found",
            )
        return name

    def _as_model(self, adapter: str | None) -> dict[str, Any]:
        base = self._frontend.model.name
        return {
            "id": adapter or base,
            "object": "model",
            "created": self._created,
            "owned_by": "pippin",
            "max_model_len": self._frontend.context_length,
            **({"parent": base} if adapter else {}),
        }


@contextlib.contextmanager
def _named(question: Question) -> Iterator[None]:
    """Errors name the fields of the JSON."""
    try:
        yield
    except InvalidRequestError as error:
        violations = [Violation(question.path(v.field), v.description) for v in error.violations]
        raise InvalidRequestError(violations) from None
    except RequestError as error:
        raise RequestError(question.path(error.field), str(error)) from None


def _json(make: Callable[[], Any]) -> bytes:
    return json.dumps(make(), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
