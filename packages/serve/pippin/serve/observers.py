"""Several who are told what the engine does, as one; and a log of requests, without what they say."""

import json
import logging
from collections.abc import Sequence

from pippin.serve.engine.request import Observer, Output, Request, Timing

_log = logging.getLogger(__name__)


class Observers:
    """Tells each of its observers (`Observer`)."""

    def __init__(self, observers: Sequence[Observer]):
        self._observers = tuple(observers)

    def on_finish(self, request: Request, output: Output, timing: Timing) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.on_finish(request, output, timing)

    def on_step(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.on_step(num_tokens, num_requests, seconds)

    def on_tokens(self, seconds: Sequence[float]) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.on_tokens(seconds)

    def on_first_token(self, request: Request, seconds: float) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.on_first_token(request, seconds)


class Traces:
    """Tells the trace of each request that it ended (`Observer`)."""

    def on_finish(self, request: Request, output: Output, timing: Timing) -> None:
        """See `Observer`."""
        if request.trace is not None:
            request.trace.finish(output, timing)

    def on_step(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """See `Observer`."""

    def on_tokens(self, seconds: Sequence[float]) -> None:
        """See `Observer`."""

    def on_first_token(self, request: Request, seconds: float) -> None:
        """See `Observer`."""


class RequestLog:
    """Logs a line for each request that ends (`Observer`): who, how long, how many tokens. Never a prompt or an output."""

    def on_finish(self, request: Request, output: Output, timing: Timing) -> None:
        """See `Observer`."""
        assert output.finish_reason is not None, "the last output"
        fields: dict[str, str | int | float | None] = {
            "request_id": request.request_id,
            "tenant": request.tenant,
            "trace_id": None if request.trace is None else request.trace.trace_id,
            "finish_reason": output.finish_reason.value,
            "prompt_tokens": output.usage.prompt_tokens,
            "cached_tokens": output.usage.cached_tokens,
            "output_tokens": output.usage.output_tokens,
            "queue_s": _since(timing.arrived, timing.scheduled),
            "first_token_s": _since(timing.arrived, timing.first_token),
            "total_s": _since(timing.arrived, timing.finished),
        }
        text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        _log.info("request %s", text, extra={"fields": fields})

    def on_step(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """See `Observer`."""

    def on_tokens(self, seconds: Sequence[float]) -> None:
        """See `Observer`."""

    def on_first_token(self, request: Request, seconds: float) -> None:
        """See `Observer`."""


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON: time, level, logger, message, and what else the record says of itself."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{record.msecs:03.0f}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 4)
