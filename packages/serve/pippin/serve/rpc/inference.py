"""The service pippin.v1.Inference."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc
import grpc.aio
from google.protobuf import duration_pb2

from pippin.serve.call import Prompt
from pippin.serve.endings import SUCCESS
from pippin.serve.engine.request import FinishReason, Output, Sampled, Usage
from pippin.serve.errors import UnfinishedError
from pippin.serve.frontend import Frontend, Generation, collect
from pippin.serve.rpc.guard import current_caller
from pippin.serve.rpc.service import service_handler
from pippin.serve.trace import trace_headers
from pippin.serve.validate import validate_batch, validate_embed, validate_generate, validate_prompt
from pippin.serve.version import server_version
from pippin.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.CONSTRAINT: pb.FINISH_REASON_CONSTRAINT,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
    FinishReason.SHUTDOWN: pb.FINISH_REASON_SHUTDOWN,
}


class InferenceService:
    """Answers with what a frontend makes. Errors are raised: `Guard` tells them."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server takes."""
        methods = {
            "Generate": self.generate,
            "GenerateBatch": self.generate_batch,
            "Tokenize": self.tokenize,
            "CountTokens": self.count_tokens,
            "GetModel": self.get_model,
            "Embed": self.embed,
        }
        return service_handler(SERVICE, methods)

    async def generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        call = validate_generate(request, self._frontend.model, self._frontend.limits)
        generation = await self._frontend.generate(
            call, current_caller().tenant, self._deadline(context), _trace_headers(context)
        )
        unfinished = None
        async with generation:
            yield pb.GenerateResponse(started=_started(generation))
            async for index, output in generation:
                if output.text or output.tokens:
                    yield pb.GenerateResponse(delta=_delta(index, output))
                if output.finish_reason is not None:
                    yield pb.GenerateResponse(finished=_finished(index, output))
                    if output.finish_reason not in SUCCESS and unfinished is None:
                        unfinished = UnfinishedError(output.finish_reason)
        if unfinished is not None:
            raise unfinished

    async def generate_batch(
        self, request: pb.GenerateBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateBatchResponse:
        calls = validate_batch(request, self._frontend.model, self._frontend.limits)
        deadline = self._deadline(context)
        generations = await self._frontend.generate_all(
            calls, current_caller().tenant, deadline, _trace_headers(context)
        )
        async with contextlib.AsyncExitStack() as stack:
            for generation in generations:
                await stack.enter_async_context(generation)
            collected = await asyncio.gather(*map(collect, generations))
        # Megabytes, where many log-probabilities are asked for.
        return await asyncio.to_thread(
            lambda: pb.GenerateBatchResponse(results=map(_result, generations, collected))
        )

    async def tokenize(self, request: pb.TokenizeRequest, _: object) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=await self._encode(request))

    async def count_tokens(self, request: pb.CountTokensRequest, _: object) -> pb.CountTokensResponse:
        return pb.CountTokensResponse(num_tokens=len(await self._encode(request)))

    async def get_model(self, request: pb.GetModelRequest, _: object) -> pb.GetModelResponse:
        model, limits = self._frontend.model, self._frontend.limits
        can = {
            pb.CAPABILITY_TEXT: model.encode is not None,
            pb.CAPABILITY_CHAT: model.encode_chat is not None,
            pb.CAPABILITY_CONSTRAINTS: model.compile_constraint is not None,
            pb.CAPABILITY_ADAPTERS: model.adapters is not None,
            pb.CAPABILITY_EMBED: True,
            pb.CAPABILITY_RELOAD: model.read_anew is not None,
        }
        longest = duration_pb2.Duration()
        longest.FromMilliseconds(int(limits.max_timeout_s * 1000))
        return pb.GetModelResponse(
            name=model.name,
            context_length=self._frontend.context_length,
            vocab_size=model.vocab_size,
            capabilities=[capability for capability, there in can.items() if there],
            limits=pb.GenerationLimits(
                max_tokens=limits.max_tokens,
                max_n=limits.max_n,
                max_prompt_bytes=limits.max_prompt_bytes,
                max_stop=limits.max_stop,
                max_stop_bytes=limits.max_stop_bytes,
                max_logit_bias=limits.max_logit_bias,
                max_logprobs=limits.max_logprobs,
                max_choices=limits.max_choices,
                max_constraint_bytes=limits.max_constraint_bytes,
                max_batch=limits.max_batch,
                max_timeout=longest,
                max_logprob_values=limits.max_logprob_values,
            ),
            server_version=server_version(),
            weights_dtype=model.weights_dtype,
            cache_dtype=model.cache_dtype,
            num_devices=model.num_devices,
        )

    async def embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        call = validate_embed(request, self._frontend.model, self._frontend.limits)
        (embedding,) = await self._frontend.embed(
            [call],
            current_caller().tenant,
            self._deadline(context),
            _trace_headers(context),
            lambda _, field: field,
        )
        return pb.EmbedResponse(values=embedding.values, prompt_tokens=embedding.prompt_tokens)

    async def _encode(self, request: pb.TokenizeRequest | pb.CountTokensRequest) -> Sequence[int]:
        prompt: Prompt
        prompt, field = validate_prompt(request, self._frontend.model, self._frontend.limits)
        return await self._frontend.encode(prompt, field, current_caller().tenant)

    def _deadline(self, context: grpc.aio.ServicerContext) -> float | None:
        """Of the call, on the engine's clock."""
        left = context.time_remaining()
        return None if left is None else self._frontend.engine.clock() + left


def _trace_headers(context: grpc.aio.ServicerContext) -> Mapping[str, str]:
    return trace_headers(context.invocation_metadata() or ())


def _started(generation: Generation) -> pb.Started:
    return pb.Started(
        request_id=generation.request_id, prompt_tokens=generation.prompt_tokens, seed=generation.seed
    )


def _delta(index: int, output: Output) -> pb.Delta:
    return pb.Delta(
        index=index,
        text=output.text,
        token_ids=[s.token for s in output.tokens],
        logprobs=_logprobs(output.tokens),
    )


def _logprobs(tokens: Sequence[Sampled]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=s.token,
            logprob=s.logprob,
            top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in s.top],
        )
        for s in tokens
        if s.logprob is not None
    ]


def _finished(index: int, output: Output) -> pb.Finished:
    assert output.finish_reason is not None, "the last output"
    finished = pb.Finished(
        index=index, finish_reason=_REASONS[output.finish_reason], usage=_usage(output.usage)
    )
    if isinstance(output.matched_stop, str):
        finished.matched_text = output.matched_stop
    elif output.matched_stop is not None:
        finished.matched_token_id = output.matched_stop
    return finished


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.output_tokens,
    )


def _result(generation: Generation, outputs: Sequence[Output]) -> pb.BatchResult:
    completions = [
        pb.Completion(
            text=output.text,
            token_ids=[s.token for s in output.tokens],
            logprobs=_logprobs(output.tokens),
            finished=_finished(index, output),
        )
        for index, output in enumerate(outputs)
    ]
    return pb.BatchResult(started=_started(generation), completions=completions)
