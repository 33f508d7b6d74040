"""What every protocol of the server shares: a call becomes requests to the engine, and their outputs a stream."""

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

from pippin.core.errors import PippinError
from pippin.serve.call import Call, Prompt, TokenIds
from pippin.serve.encoding_threads import EncodingThreads
from pippin.serve.engine.engine import Engine
from pippin.serve.engine.request import Constraint, FinishReason, Output, Request
from pippin.serve.errors import DuplicateError, QueueFullError, RequestError, SlowReaderError, UnfinishedError
from pippin.serve.request_limits import RequestLimits
from pippin.serve.served_model import ServedModel

# How long after a deadline the engine's own word for it is waited for: it may be in a long step, or hang.
_DEADLINE_GRACE_S = 0.5
# Tokenizing releases Python's lock; more threads would take the cores from the engine.
_ENCODING_THREADS = 2


class Generation:
    """The outputs of a call, as an asynchronous iterator of (index of the completion, what is new of it).

    What comes while nobody takes is put together, so that little waits. Leaving the `async with` block ends what
    is not finished, and frees all that it holds.
    """

    def __init__(
        self, frontend: "Frontend", call: Call, tenant: str, prompt_tokens: int, deadline: float | None
    ):
        self.request_id, self.seed, self.prompt_tokens = call.request_id, call.sampling.seed, prompt_tokens
        self.n = call.n
        self._frontend, self._tenant, self._deadline = frontend, tenant, deadline
        self._loop = asyncio.get_running_loop()
        self._unfinished = dict.fromkeys(range(call.n))
        self._pending: dict[int, Output] = {}  # index -> what was not taken yet
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
        return index, self._pending.pop(index)

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
        before = self._pending.get(index)
        self._pending[index] = output if before is None else _together(before, output)
        if sum(len(o.tokens) for o in self._pending.values()) > self._frontend.limits.max_pending_tokens:
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

    def __init__(self, engine: Engine, model: ServedModel, limits: RequestLimits):
        self.engine, self.model, self.limits = engine, model, limits
        self.context_length = min(model.context_length, engine.limits.max_context)
        self._open: dict[tuple[str, str], Generation] = {}  # tenant, request_id -> generation
        self._threads = EncodingThreads(_ENCODING_THREADS, limits.max_encoding)

    async def generate(self, call: Call, tenant: str = "", deadline: float | None = None) -> Generation:
        """The stream of a call's outputs; `deadline` is in seconds on the engine's clock.

        Raises:
            RequestError: it can never be served, such as a prompt that does not fit.
            DuplicateError: a call of this tenant with its id is being served.
            QueueFullError: too much waits.
            DrainingError: no more calls are taken.
            UnfinishedError: the deadline passed before it was tokenized.
        """
        (generation,) = await self.generate_all([call], tenant, deadline, lambda _, field: field)
        return generation

    async def generate_all(
        self,
        calls: Sequence[Call],
        tenant: str,
        deadline: float | None,
        path: Callable[[int, str], str] = lambda i, field: f"requests[{i}].{field}",
    ) -> list[Generation]:
        """The streams of several calls, of which all are taken or none; errors as `generate`'s, with `path`."""
        arrived = self.engine.clock()
        generations: list[Generation] = []
        with contextlib.ExitStack() as undo:
            for i, call in enumerate(calls):
                try:
                    generation, requests = await self._prepare(call, tenant, arrived, deadline)
                    undo.callback(generation.close)
                    for index, request in enumerate(requests):
                        self.engine.submit(request, generation.receiver(index))
                except RequestError as error:
                    raise RequestError(path(i, error.field), str(error)) from error
                generations.append(generation)
            undo.pop_all()
        return generations

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

    async def _prepare(
        self, call: Call, tenant: str, arrived: float, deadline: float | None
    ) -> tuple[Generation, list[Request]]:
        most = min(call.timeout_s or self.limits.max_timeout_s, self.limits.max_timeout_s)
        deadline = arrived + most if deadline is None else min(deadline, arrived + most)
        try:
            async with asyncio.timeout(max(0.0, deadline - self.engine.clock())):
                prompt = await self.encode(call.prompt, call.prompt_field, tenant)
                # Each has a state of its own.
                constraints = [await self._constraint(call, tenant) for _ in range(call.n)]
        except TimeoutError:
            raise UnfinishedError(FinishReason.DEADLINE) from None
        if (tenant, call.request_id) in self._open:
            raise DuplicateError(
                f"A request with request_id {call.request_id!r} is being served. Wait for it, or choose another id."
            )
        max_tokens = self._max_tokens(call, len(prompt))
        generation = Generation(self, call, tenant, len(prompt), deadline)
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
                text=self.model.encode is not None,
            )
            for index, constraint in enumerate(constraints)
        ]
        return generation, requests

    def _max_tokens(self, call: Call, num_prompt: int) -> int:
        room = self.context_length - num_prompt
        if room < 1:
            raise RequestError(
                call.prompt_field,
                f"has {num_prompt} tokens; the model's context holds {self.context_length} with the output. "
                "Shorten it.",
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

    async def _constraint(self, call: Call, tenant: str) -> Constraint | None:
        if call.constraint is None:
            return None
        compile_constraint = self.model.compile_constraint
        assert compile_constraint is not None, "a validated call"
        return await self._in_thread(tenant, call.constraint_field, compile_constraint, call.constraint)

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


def _together(*outputs: Output) -> Output:
    """One output for several of a completion, in their order."""
    return dataclasses.replace(
        outputs[-1],
        text="".join(o.text for o in outputs),
        tokens=tuple(token for o in outputs for token in o.tokens),
    )


def _seed(seed: int, index: int) -> int:
    """Of a completion: the first has the call's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
