"""The engine: a thread that computes step after step, for as many requests as there are."""

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from pippin.serve.engine.draft_model import DraftModel
from pippin.serve.engine.request import (
    CONSTRAINT_FAILED,
    FinishReason,
    Observer,
    Output,
    Request,
    Sampled,
    Sums,
    Timing,
    Usage,
)
from pippin.serve.engine.scheduler import Generation, Limits, Row, Runner, Scheduler
from pippin.serve.engine.suspects import Suspects
from pippin.serve.engine.text import TextStream
from pippin.serve.errors import (
    ConstraintError,
    DrainingError,
    DuplicateError,
    PreconditionError,
    QueueFullError,
    RequestError,
)

_log = logging.getLogger(__name__)

# How long `stop` waits for the step that is being computed.
_LAST_STEP_S = 10.0
# So many steps that fail one after the other are not the fault of requests.
_MANY_FAILURES = 64
_RESET_AGAIN_S = 1.0

OnOutput = Callable[[Output], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What may wait, and for how long the engine may stand still."""

    max_waiting: int = 256  # requests
    max_waiting_tokens: int = 131_072  # of their prompts, and of those that are being computed
    stall_s: float = 60.0  # without a step, while there is work: the engine hangs


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy the engine is."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    used_pages: int
    num_pages: int
    steps: int
    preemptions: int
    prefix_queries: int  # tokens
    prefix_hits: int  # tokens
    draining: bool
    stalled: bool
    generated: int = 0  # tokens of output, since the start
    drafts: int = 0  # tokens that were guessed
    right_drafts: int = 0  # and guessed rightly
    taken: int = 0  # requests, since the start: each of them ends once


class _Stream:
    """Where the tokens of a request go."""

    def __init__(self, request: Request, on_output: OnOutput, token_bytes: Callable[[int], bytes]):
        self.request, self.on_output = request, on_output
        wants_text = request.text or request.stop_strings
        self.text = TextStream(token_bytes, request.stop_strings) if wants_text else None


class _Exchange:
    """A change that waits until nothing is being served."""

    def __init__(self, change: Callable[[], None]):
        self.change = change
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()


class Engine:
    """Serves requests with a runner, in a thread of its own.

    Outputs are handed over in that thread: who takes them must not block. Of the requests of a step that failed, halves are
    computed apart, and their halves, until the one that made it fail is found: it ends alone.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        token_bytes: Callable[[int], bytes],
        *,
        draft_model: DraftModel | None = None,
        queue: QueueLimits = QueueLimits(),
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.limits, self.queue, self.observer, self.clock = limits, queue, observer, clock
        self.token_bytes, self._runner, self._draft_model = token_bytes, runner, draft_model
        self._scheduler = Scheduler(limits, draft_model is not None)
        self._streams: dict[str, _Stream] = {}  # request_id -> stream
        self._outbox: list[
            Callable[[], None]
        ] = []  # what the thread tells others, in this order, without the lock
        self._suspects = Suspects()
        self._exchange: _Exchange | None = None
        self._lock = threading.Condition()
        self._draining = self._stopped = False
        self._steps = self._generated = self._taken = 0
        self._num_failures = 0  # of steps, since the last one that went well
        self._progress = clock()  # when the last step ended, or work came to an idle engine
        self._tokens_per_s = 0.0  # lately
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._progress = self.clock()
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Takes a request, whose outputs go to `on_output`.

        Raises:
            RequestError: it can never be served.
            DuplicateError: one with its id is being served.
            QueueFullError: too much waits.
            DrainingError: no more requests are taken.
        """
        if request.num_tokens > self.limits.max_context:
            raise RequestError(
                "max_tokens",
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.max_tokens}, and together they must "
                f"not be more than {self.limits.max_context}. Shorten the prompt or ask for fewer tokens.",
            )
        with self._lock:
            if self._draining:
                raise DrainingError("this server is about to stop. Ask another one.")
            if request.request_id in self._scheduler:
                raise DuplicateError(
                    f"a request with request_id {request.request_id!r} is being served. Give each request another id."
                )
            self._require_room(request)
            if not self._streams:
                self._progress = self.clock()
            self._streams[request.request_id] = _Stream(request, on_output, self.token_bytes)
            self._scheduler.add(request, self.clock())
            self._taken += 1
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        """Ends a request that is being served; its pages are free at once."""
        with self._lock:
            if request_id in self._scheduler:
                self._end(request_id, FinishReason.CANCELLED)

    def exchange(self, change: Callable[[], None]) -> concurrent.futures.Future[None]:
        """Has the engine's thread change what the runner computes with, between two steps.

        Requests that had a turn are served to their ends before; those that wait, and those that come, are served after.
        What the cache holds is forgotten. The result is set when it is done, or has the error of the change. Until the change
        has begun, `cancel` of the result withdraws it, and all goes on as before.

        Raises:
            PreconditionError: another change waits.
            DrainingError: no more requests are taken.
        """
        with self._lock:
            if self._draining:
                raise DrainingError("this server is about to stop.")
            if self._exchange is not None:
                raise PreconditionError("A change waits for requests to end already. Wait for it, too.")
            self._exchange = exchange = _Exchange(change)
            self._lock.notify_all()
        exchange.done.add_done_callback(self._withdraw)
        return exchange.done

    def load(self) -> Load:
        """How busy the engine is now."""
        with self._lock:
            scheduler = self._scheduler
            stands = bool(self._streams) and self.clock() - self._progress > self.queue.stall_s
            dead = self._thread.ident is not None and not self._thread.is_alive() and not self._stopped
            stalled = stands or dead or self._num_failures >= _MANY_FAILURES
            return Load(
                len(scheduler.running),
                len(scheduler.waiting),
                scheduler.waiting.num_tokens,
                scheduler.pool.num_pages - scheduler.pool.num_free,
                scheduler.pool.num_pages,
                self._steps,
                scheduler.num_preemptions,
                scheduler.prefix_queries,
                scheduler.prefix_hits,
                self._draining,
                stalled,
                self._generated,
                scheduler.num_drafts,
                scheduler.num_right_drafts,
                self._taken,
            )

    def drain(self) -> None:
        """Takes no more requests; those that were taken are served."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()

    def stop(self, grace_s: float) -> None:
        """Drains, waits until all requests ended or the time is over, ends what is left, and stops the thread."""
        self.drain()
        until = time.monotonic() + grace_s
        with self._lock:
            while self._streams and (left := until - time.monotonic()) > 0:
                self._lock.wait(left)
            for request_id in list(self._streams):
                self._end(request_id, FinishReason.SHUTDOWN)
            self._stopped = True
            if self._exchange is not None:
                self._exchange.done.cancel()
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(_LAST_STEP_S)
        self._deliver()  # where a step hangs

    def _require_room(self, request: Request) -> None:
        waiting, queue = self._scheduler.waiting, self.queue
        ahead, count = self._scheduler.tokens_ahead(), len(request.prompt)
        # A prompt that is longer than the limit is taken where none waits.
        fits = ahead + count <= queue.max_waiting_tokens
        alone = count > queue.max_waiting_tokens and len(waiting) == 0
        if len(waiting) < queue.max_waiting and (fits or alone):
            return
        # Where others fill the queue, there is still a place for who has less than a share of it.
        shares = waiting.num_tenants + 1
        own, _ = waiting.waiting(request.tenant)
        own_tokens = self._scheduler.tokens_ahead(request.tenant) + count
        if own < queue.max_waiting // shares and own_tokens <= queue.max_waiting_tokens // shares:
            return
        retry_after_s = min(60.0, max(1.0, ahead / max(self._tokens_per_s, 1.0)))
        raise QueueFullError(
            f"{len(waiting)} requests wait already, and {ahead} tokens are to be computed first, of {queue.max_waiting} and "
            f"{queue.max_waiting_tokens} at most. Try again in {retry_after_s:.0f} s.",
            retry_after_s,
        )

    def _serve(self) -> None:
        while not self._stopped:
            try:
                self._turn()
            except Exception:  # noqa: BLE001  a server that cannot go on is worse
                _log.exception("the engine is at fault: all requests end, and it starts over")
                self._start_over()
        self._deliver()

    def _turn(self) -> None:
        """Waits for work, and computes a step."""
        with self._lock:
            while not (self._streams or self._outbox or self._stopped or self._exchange):
                self._lock.wait()
            self._expire()
            # Until a change that waits is made, only those go on that have begun.
            only = self._suspects.group or (self._scheduler.begun() if self._exchange else None)
            exchange = None if only else self._exchange
            rows = [] if exchange else self._scheduler.schedule(self.clock(), only)
        self._deliver()
        if exchange is not None and not self._stopped:
            self._change(exchange)
        elif rows and not self._stopped:
            self._step(rows)

    def _withdraw(self, done: concurrent.futures.Future[None]) -> None:
        """Forgets a change that nobody wants any more."""
        with self._lock:
            if done.cancelled() and self._exchange is not None and self._exchange.done is done:
                self._exchange = None
                self._lock.notify_all()

    def _change(self, exchange: _Exchange) -> None:
        """Makes the change that waits; nothing is being served."""
        if not exchange.done.set_running_or_notify_cancel():
            return  # it was withdrawn
        error = None
        try:
            exchange.change()
        except Exception as e:  # noqa: BLE001  whoever asked for it is told, and all else goes on
            error = e
        with self._lock:
            self._exchange = None
            self._scheduler.reset()
            self._progress = self.clock()
        if error is None:
            exchange.done.set_result(None)
        else:
            exchange.done.set_exception(error)

    def _start_over(self) -> None:
        """Ends all requests, whatever state they are in, and forgets them."""
        with self._lock:
            now = self.clock()
            for request_id, stream in self._streams.items():
                self._part(
                    stream,
                    Output(request_id, finish_reason=FinishReason.FAILED),
                    Timing(now, None, None, now),
                )
            self._streams.clear()
            self._suspects.clear()
            self._scheduler = Scheduler(self.limits, self._draft_model is not None)
            self._num_failures += 1
            self._lock.notify_all()
        self._deliver()
        self._reset_runner()

    def _reset_runner(self) -> None:
        """Makes the cache anew, again and again until it can be made."""
        while not self._stopped:
            try:
                self._runner.reset()
                return
            except Exception:  # noqa: BLE001  without a cache there is nothing to go on with
                _log.exception("the cache cannot be made anew; trying again in %g s", _RESET_AGAIN_S)
                self._num_failures = max(self._num_failures, _MANY_FAILURES)
                time.sleep(_RESET_AGAIN_S)

    def _part(self, stream: _Stream, output: Output, timing: Timing) -> None:
        """Hands over a request's last output."""
        # First: who has the last output finds the request in the metrics.
        self._tell_later(lambda observer: observer.on_finish(stream.request, output, timing))
        self._hand_over(stream, output)

    def _hand_over(self, stream: _Stream, output: Output) -> None:
        def hand_over() -> None:
            try:
                stream.on_output(output)
            except Exception:  # noqa: BLE001  the caller's fault, not that of other requests
                _log.exception("an output of request %s could not be handed over", output.request_id)

        self._outbox.append(hand_over)

    def _tell_later(self, tell: Callable[[Observer], None]) -> None:
        self._outbox.append(lambda: self._tell(tell))

    def _log_later(self, message: str, request_id: str, error: Exception | None = None) -> None:
        """Logs an error. A log may block, and whoever holds the lock holds all callers."""
        self._outbox.append(lambda: _log.error(message, request_id, exc_info=error))

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        """Tells the observer something. What it does wrong is not the requests' fault."""
        if self.observer is None:
            return
        try:
            tell(self.observer)
        except Exception:  # noqa: BLE001  metrics are not worth a request
            _log.exception("the observer failed")

    def _step(self, rows: Sequence[Row]) -> None:
        start = self.clock()
        rows = self._with_guesses(rows)
        try:
            sampled = self._runner.run(rows)
        except Exception:  # noqa: BLE001  whatever it was, the other requests go on
            _log.exception("a step of %d requests failed", len(rows))
            self._recover(rows)
            return
        now = self.clock()
        num_tokens = sum(len(row.tokens) for row in rows)
        with self._lock:
            self._steps += 1
            self._num_failures = 0
            self._progress = now
            rate = num_tokens / max(now - start, 1e-6)
            self._tokens_per_s = rate if not self._tokens_per_s else 0.9 * self._tokens_per_s + 0.1 * rate
            for row in rows:
                # A request whose step went well, up to its next token, did not make one fail.
                if row.sampling is not None:
                    self._suspects.remove(row.request_id)
            gaps = self._advance(rows, sampled, now)
        self._deliver()
        self._tell(lambda observer: observer.on_step(num_tokens, len(rows), now - start))
        self._tell(lambda observer: observer.on_tokens(gaps))

    def _with_guesses(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows with the draft model's guesses, if there is one. Once it is of no use, guesses come from the texts."""
        if self._draft_model is None:
            return rows
        rows = self._draft_model.draft(rows)
        if self._draft_model.has_given_up:
            self._draft_model = None
            self._scheduler.drafts_by_model = False
        return rows

    def _advance(
        self, rows: Sequence[Row], sampled: Sequence[Sequence[Sampled] | Sums], now: float
    ) -> list[float]:
        """Tells each request its tokens. The result: how long after the one before each came, in seconds."""
        gaps = []
        for row, of_row in zip(rows, sampled, strict=True):
            generation = self._scheduler.running.get(row.request_id)
            if generation is None:
                continue  # it ended meanwhile; one with the same id may wait already
            if isinstance(of_row, Sums):
                self._add_sums(row, of_row)
                continue
            tokens = row.accepted(of_row, lambda one: one.token)
            self._scheduler.update(row, [one.token for one in tokens if one.token >= 0])
            for one in tokens:
                if row.request_id in self._streams:  # a token before may have ended it
                    gaps += self._next_token(generation, one, now)
        return gaps

    def _add_sums(self, row: Row, sums: Sums) -> None:
        total = self._scheduler.add_sums(row, sums)
        if total is None:
            return
        if np.isfinite(total).all():
            self._end(row.request_id, FinishReason.STOP, sums=total)
        else:
            self._log_later("request %s failed: its hidden states are not finite", row.request_id)
            self._end(row.request_id, FinishReason.FAILED)

    def _next_token(self, generation: Generation, sampled: Sampled, now: float) -> list[float]:
        request_id = generation.request.request_id
        if sampled.token == CONSTRAINT_FAILED:
            self._end(request_id, FinishReason.CONSTRAINT)
            return []
        if sampled.token < 0:
            self._log_later("request %s failed: it has no next token", request_id)
            self._end(request_id, FinishReason.FAILED)
            return []
        gaps = []
        if generation.first_token is None:
            generation.first_token = now
            first_s = now - generation.arrived
            self._tell_later(lambda observer: observer.on_first_token(generation.request, first_s))
        else:
            gaps.append(now - generation.last_token)
        generation.last_token = now
        generation.num_told += 1
        self._generated += 1
        try:
            self._output(generation, sampled)
        except ConstraintError as error:
            reason = str(error)
            self._outbox.append(
                lambda: _log.warning("the constraint of request %s failed: %s", request_id, reason)
            )
            self._end(request_id, FinishReason.CONSTRAINT)
        except Exception as error:  # noqa: BLE001  its constraint may be at fault, and nobody else is
            self._log_later("request %s failed at a token", request_id, error)
            self._end(request_id, FinishReason.FAILED)
        return gaps

    def _output(self, generation: Generation, sampled: Sampled) -> None:
        """Hands a request's caller what is new after a token, if anything is."""
        request = generation.request
        stream, token = self._streams[request.request_id], sampled.token
        complete = request.constraint is not None and request.constraint.accept(token)
        reason, matched = None, None
        text, tokens = "", ()
        if token in request.stop_ids:
            reason, matched = FinishReason.STOP, token
        elif stream.text is None:
            tokens = (sampled,)
        elif (matched := stream.text.add(sampled)) is not None:
            reason = FinishReason.STOP
        if reason is None and complete:
            reason = FinishReason.STOP
        elif reason is None and generation.num_told >= request.max_tokens:
            reason = FinishReason.LENGTH
        if stream.text is not None:
            text, tokens = stream.text.take(last=reason is not None)
        if reason is not None:
            self._end(request.request_id, reason, text, tokens, matched)
        elif tokens or text:
            output = Output(request.request_id, text, tokens, usage=_usage(generation))
            self._hand_over(stream, output)

    def _end(
        self,
        request_id: str,
        reason: FinishReason,
        text: str = "",
        tokens: tuple[Sampled, ...] = (),
        matched: str | int | None = None,
        sums: np.ndarray | None = None,
    ) -> None:
        """Frees all that a request has, and hands its caller the last output."""
        generation = self._scheduler.remove(request_id)
        stream = self._streams.pop(request_id)
        self._suspects.remove(request_id)
        output = Output(request_id, text, tokens, reason, matched, _usage(generation), sums)
        times = Timing(generation.arrived, generation.scheduled, generation.first_token, self.clock())
        self._part(stream, output, times)
        self._lock.notify_all()

    def _expire(self) -> None:
        now = self.clock()
        for generation in self._scheduler.generations():
            deadline = generation.request.deadline
            if deadline is not None and deadline <= now:
                self._end(generation.request.request_id, FinishReason.DEADLINE)

    def _recover(self, rows: Sequence[Row]) -> None:
        """After a step that failed: its requests are suspected, or it is known which one was at fault."""
        with self._lock:
            self._num_failures += 1
            # Not one that came since, under the id of one that was cancelled.
            there = [row.request_id for row in rows if row.request_id in self._scheduler.running]
            if len(rows) == 1 and there:
                self._end(there[0], FinishReason.FAILED)
            elif there:
                self._suspects.split(there)
            self._scheduler.reset()
        self._reset_runner()

    def _deliver(self) -> None:
        """Tells others what is to be told. Not under the lock: they may take their time."""
        with self._lock:
            outbox, self._outbox = self._outbox, []
        for tell in outbox:
            tell()


def _usage(generation: Generation) -> Usage:
    return Usage(len(generation.request.prompt), generation.num_cached, generation.num_told)
