"""What every protocol of the server shares: a call becomes requests to the engine, and their outputs a stream."""

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from pippin.core.errors import PippinError
from pippin.serve.adapters import Loaded
from pippin.serve.call import Call, Prompt, TokenIds
from pippin.serve.encoding_threads import EncodingThreads
from pippin.serve.engine.engine import Engine
from pippin.serve.engine.request import Constraint, FinishReason, Output, Request, Trace
from pippin.serve.errors import (
    DuplicateError,
    NotFoundError,
    QueueFullError,
    RequestError,
    SlowReaderError,
    UnfinishedError,
)
from pippin.serve.request_limits import RequestLimits
from pippin.serve.served_model import ConstraintSpec, ServedModel
from pippin.serve.trace import BeginTrace, note_trace

# How long after a deadline the engine's own word for it is waited for: it may be in a long step, or hang.
_DEADLINE_GRACE_S = 0.5
# Tokenizing releases Python's lock; more threads would take the cores from the engine.
_ENCODING_THREADS = 2
# So much of a completion (see `_size`) is put into one output: writing it takes milliseconds.
_SLICE = 1024
_LEAST_LENGTH = 1e-12  # of a vector: none is divided by 0


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A vector of a prompt."""

    values: np.ndarray  # [D], float32, of length 1
    prompt_tokens: int


class Generation:
    """The outputs of a call, as an asynchronous iterator of (index of the completion, what is new of it).

    What comes while nobody takes is put together, so that little waits; into several outputs where it is much, so that writing
    one holds nobody up. Leaving the `async with` block ends what
    is not finished, and frees all that it holds.
    """

    def __init__(
        self,
        frontend: "Frontend",
        call: Call,
        tenant: str,
        prompt_tokens: int,
        deadline: float | None,
        adapter: Loaded | None,
    ):
        self.adapter = adapter
        self.request_id, self.seed, self.prompt_tokens = call.request_id, call.sampling.seed, prompt_tokens
        self.n = call.n
        self._frontend, self._tenant, self._deadline = frontend, tenant, deadline
        self._loop = asyncio.get_running_loop()
        self._unfinished = dict.fromkeys(range(call.n))
        self._pending: dict[int, list[Output]] = {}  # index -> what was not taken yet, at least one
        self._num_pending = 0  # tokens
        self._news = asyncio.Event()
        self._error: PippinError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        """Raises SlowReaderError where too much was not taken."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._news.clear()
            try:
                async with asyncio.timeout(self._time_left()):
                    await self._news.wait()
            except TimeoutError:
                self._expire()
        index = next(iter(self._pending))
        output, *rest = self._pending.pop(index)
        if rest:
            self._pending[index] = rest  # behind the other completions
        self._num_pending -= len(output.tokens)
        return index, output

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is not finished. Idempotent."""
        for index in self._unfinished:
            self._frontend.engine.cancel(self.engine_id(index))
        self._unfinished.clear()
        self._frontend.closed(self, self._tenant)

    def engine_id(self, index: int) -> str:
        """The engine's name for a completion: callers of two tenants may choose the same request_id."""
        return f"{self._tenant}/{self.request_id}/{index}"

    def receiver(self, index: int) -> Callable[[Output], None]:
        """What the engine's thread calls with the outputs of a completion."""

        def receive(output: Output) -> None:
            self._loop.call_soon_threadsafe(self._put, index, output)

        return receive

    def _put(self, index: int, output: Output) -> None:
        if index not in self._unfinished:
            return
        if output.finish_reason is not None:
            del self._unfinished[index]
        pending = self._pending.setdefault(index, [])
        if pending and _size(pending[-1]) < _SLICE:
            pending[-1] = _together(pending[-1], output)
        else:
            pending.append(output)
        self._num_pending += len(output.tokens)
        if self._num_pending > self._frontend.limits.max_pending_tokens:
            self._error = SlowReaderError("The stream was not read for too long. Read it as it comes.")
            self._pending.clear()
            self.close()
        self._news.set()

    def _time_left(self) -> float | None:
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self._frontend.engine.clock()) + _DEADLINE_GRACE_S

    def _expire(self) -> None:
        """The engine has not said that the deadline passed."""
        for index in list(self._unfinished):
            self._frontend.engine.cancel(self.engine_id(index))
            self._put(index, Output(self.engine_id(index), finish_reason=FinishReason.DEADLINE))


class Frontend:
    """Takes calls for an engine. Its methods are for one event loop."""

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        limits: RequestLimits,
        begin_trace: BeginTrace = note_trace,
    ):
        self.engine, self.model, self.limits = engine, model, limits
        self.context_length = min(model.context_length, engine.limits.max_context)
        self._open: dict[tuple[str, str], Generation] = {}  # tenant, request_id -> generation
        self._threads = EncodingThreads(_ENCODING_THREADS, limits.max_encoding)
        self._begin_trace = begin_trace

    async def generate(
        self,
        call: Call,
        tenant: str = "",
        deadline: float | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Generation:
        """The stream of a call's outputs; `deadline` is in seconds on the engine's clock; `headers` name its trace.

        Raises:
            RequestError: it can never be served, such as a prompt that does not fit.
            DuplicateError: a call of this tenant with its id is being served.
            QueueFullError: too much waits.
            DrainingError: no more calls are taken.
            UnfinishedError: the deadline passed before it was tokenized.
        """
        (generation,) = await self.generate_all([call], tenant, deadline, headers, lambda _, field: field)
        return generation

    async def generate_all(
        self,
        calls: Sequence[Call],
        tenant: str,
        deadline: float | None,
        headers: Mapping[str, str] = MappingProxyType({}),
        path: Callable[[int, str], str] = lambda i, field: f"requests[{i}].{field}",
    ) -> list[Generation]:
        """The streams of several calls, of which all are taken or none; errors as `generate`'s, with `path`."""
        arrived = self.engine.clock()
        generations: list[Generation] = []
        num_logprobs = 0
        with contextlib.ExitStack() as undo:
            for i, call in enumerate(calls):
                try:
                    with _traced(self._begin_trace(call, headers)) as trace:
                        generation, requests = await self._prepare(call, tenant, arrived, deadline, trace)
                        undo.callback(generation.close)
                        num_logprobs += sum(map(_num_logprobs, requests))
                        self._require_logprobs(num_logprobs)
                        for index, request in enumerate(requests):
                            self.engine.submit(request, generation.receiver(index))
                except RequestError as error:
                    raise RequestError(path(i, error.field), str(error)) from error
                generations.append(generation)
            undo.pop_all()
        return generations

    async def embed(
        self,
        calls: Sequence[Call],
        tenant: str,
        deadline: float | None,
        headers: Mapping[str, str],
        path: Callable[[int, str], str],
    ) -> list[Embedding]:
        """The vectors of the prompts of calls that embed; errors and arguments as `generate_all`'s.

        A vector has the direction of the mean, over the prompt's tokens, of the hidden states behind the last norm.

        Raises:
            UnfinishedError: one of them was not computed.
        """
        generations = await self.generate_all(calls, tenant, deadline, headers, path)
        async with contextlib.AsyncExitStack() as stack:
            for generation in generations:
                await stack.enter_async_context(generation)
            collected = await asyncio.gather(*map(collect, generations))
        return [_embedding(output) for (output,) in collected]

    async def encode(self, prompt: Prompt, field: str, tenant: str = "") -> tuple[int, ...]:
        """The token ids of a prompt.

        Raises:
            RequestError: it cannot be encoded, or is empty; `field` is told as its path.
            QueueFullError: too many texts wait to be encoded.
        """
        encode, encode_chat = self.model.encode, self.model.encode_chat
        if isinstance(prompt, str):
            assert encode is not None, "a validated call"
            ids = tuple(await self._in_thread(tenant, field, encode, prompt))
        elif isinstance(prompt, TokenIds):
            ids = prompt.ids
        else:
            assert encode_chat is not None, "a validated call"
            ids = tuple(await self._in_thread(tenant, field, encode_chat, prompt.messages))
        if not ids:
            raise RequestError(field, "has no tokens. Write something to continue.")
        return ids

    def close(self) -> None:
        """Ends the threads. No call may be open."""
        self._threads.close()

    def closed(self, generation: Generation, tenant: str) -> None:
        """A generation ended: its id may be used again."""
        if self._open.get((tenant, generation.request_id)) is generation:
            del self._open[tenant, generation.request_id]
            if generation.adapter is not None and self.model.adapters is not None:
                self.model.adapters.give_back(generation.adapter)

    async def _prepare(
        self, call: Call, tenant: str, arrived: float, deadline: float | None, trace: Trace | None
    ) -> tuple[Generation, list[Request]]:
        most = min(call.timeout_s or self.limits.max_timeout_s, self.limits.max_timeout_s)
        deadline = arrived + most if deadline is None else min(deadline, arrived + most)
        try:
            async with asyncio.timeout(max(0.0, deadline - self.engine.clock())):
                prompt = await self.encode(call.prompt, call.prompt_field, tenant)
                constraints = await self._constraints(call, tenant)
        except TimeoutError:
            raise UnfinishedError(FinishReason.DEADLINE) from None
        if (tenant, call.request_id) in self._open:
            raise DuplicateError(
                f"A request with request_id {call.request_id!r} is being served. Wait for it, or choose another id."
            )
        max_tokens = self._max_tokens(call, len(prompt))
        adapter = self._adapter(call)
        generation = Generation(self, call, tenant, len(prompt), deadline, adapter)
        self._open[tenant, call.request_id] = generation
        requests = [
            Request(
                request_id=generation.engine_id(index),
                prompt=prompt,
                max_tokens=max_tokens,
                sampling=dataclasses.replace(call.sampling, seed=_seed(call.sampling.seed, index)),
                stop_ids=call.stop_ids | (frozenset() if call.ignore_eos else self.model.stop_ids),
                stop_strings=call.stop_strings,
                priority=call.priority,
                tenant=tenant,
                cache_salt=call.cache_salt,
                deadline=deadline,
                constraint=constraint,
                adapter=None if adapter is None else adapter.adapter,
                text=self.model.encode is not None and not call.embeds,
                sums=call.embeds,
                trace=trace,
            )
            for index, constraint in enumerate(constraints)
        ]
        return generation, requests

    def _adapter(self, call: Call) -> Loaded | None:
        """What the call named; to be given back."""
        if call.adapter is None or self.model.adapters is None:
            return None
        try:
            return self.model.adapters.take(call.adapter)
        except NotFoundError as error:
            raise RequestError("adapter", str(error)) from error

    def _max_tokens(self, call: Call, num_prompt: int) -> int:
        room = self.context_length - num_prompt
        if call.embeds and room >= 0:
            return 0
        if room < 1:
            raise RequestError(
                call.prompt_field,
                f"has {num_prompt} tokens; the model's context holds {self.context_length}"
                f"{'' if call.embeds else ' with the output'}. Shorten it.",
            )
        if call.max_tokens is None:
            return min(room, self.limits.max_tokens)
        if call.max_tokens > room:
            raise RequestError(
                "max_tokens",
                f"is {call.max_tokens}, and the prompt has {num_prompt} tokens; the model's context holds "
                f"{self.context_length} in all. Ask for {room} at most.",
            )
        return call.max_tokens

    def _require_logprobs(self, count: int) -> None:
        most = self.limits.max_logprob_values
        if count > most:
            raise RequestError(
                "logprobs",
                f"asks for {count} log-probabilities in all (for each completion max_tokens times one more than logprobs); at "
                f"most {most} are told in one answer. Ask for fewer tokens, completions or logprobs.",
            )

    async def _constraints(self, call: Call, tenant: str) -> Sequence[Constraint | None]:
        """One for each completion: compiled once, and each with a state of its own."""
        if call.constraint is None:
            return [None] * call.n
        compile_constraint = self.model.compile_constraint
        assert compile_constraint is not None, "a validated call"

        def compiled(spec: ConstraintSpec) -> list[Constraint | None]:
            first = compile_constraint(spec)
            return [first, *(first.copy() for _ in range(call.n - 1))]

        return await self._in_thread(tenant, call.constraint_field, compiled, call.constraint)

    async def _in_thread[T](self, tenant: str, field: str, function: Callable[[Any], T], argument: Any) -> T:
        try:
            return await self._threads.run(tenant, function, argument)
        except (RequestError, QueueFullError):
            raise
        except PippinError as error:
            raise RequestError(field, str(error)) from error


async def take[T](written: Awaitable[T], timeout_s: float) -> T:
    """What is awaited, a write to a stream.

    Raises:
        SlowReaderError: the other side took nothing for so long.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await written
    except TimeoutError:
        raise SlowReaderError(f"The stream was not read for {timeout_s:g} s. Read it as it comes.") from None


async def collect(generation: Generation) -> list[Output]:
    """The completions of a call, whole, by index."""
    parts: list[list[Output]] = [[] for _ in range(generation.n)]
    async for index, output in generation:
        parts[index].append(output)
    return [_together(*outputs) for outputs in parts]


@contextlib.contextmanager
def _traced(trace: Trace | None) -> Iterator[Trace | None]:
    """Tells a trace where its call is not taken."""
    try:
        yield trace
    except BaseException as error:
        if trace is not None:
            trace.fail(error.reason.value if isinstance(error, UnfinishedError) else type(error).__name__)
        raise


def _together(*outputs: Output) -> Output:
    """One output for several of a completion, in their order."""
    return dataclasses.replace(
        outputs[-1],
        text="".join(o.text for o in outputs),
        tokens=tuple(token for o in outputs for token in o.tokens),
    )


def _embedding(output: Output) -> Embedding:
    assert output.finish_reason is not None, "the last output"
    if output.sums is None:
        raise UnfinishedError(output.finish_reason)
    length = max(float(np.linalg.norm(output.sums)), _LEAST_LENGTH)
    return Embedding((output.sums / length).astype(np.float32), output.usage.prompt_tokens)


def _size(output: Output) -> int:
    """Of what is written of it: its tokens, and the most likely ones that are told of each."""
    return len(output.tokens) * (1 + len(output.tokens[-1].top)) if output.tokens else 0


def _num_logprobs(request: Request) -> int:
    """That a completion may have."""
    logprobs = request.sampling.logprobs
    return 0 if logprobs is None else request.max_tokens * (1 + logprobs)


def _seed(seed: int, index: int) -> int:
    """Of a completion: the first has the call's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
