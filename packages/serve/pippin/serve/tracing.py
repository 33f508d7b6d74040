"""OpenTelemetry traces: a span for each call, and in it what its completions waited for. Never what was said.

Names are those of OpenTelemetry's conventions for generative AI. Imported only where `--otlp-endpoint` is given.
"""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pippin.serve.call import Call, Chat
from pippin.serve.endings import SUCCESS
from pippin.serve.engine.request import Output, Timing

# Spans that wait to be told are bounded by the SDK, which drops what comes beyond. So long it may take at the end.
_FLUSH_S = 3.0


class Tracing:
    """Makes a trace of each call (`Trace`), a part of its caller's trace where that is known."""

    def __init__(self, exporter: SpanExporter, model_name: str, version: str):
        resource = Resource.create({"service.name": "pippin-serve", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._exporter = exporter
        self._tracer = self._provider.get_tracer("pippin.serve", version)
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call: Call, headers: Mapping[str, str]) -> "SpanTrace":
        """The trace of a call that came; `headers` as `trace.trace_headers` finds them."""
        if call.embeds:
            operation = "embeddings"
        else:
            operation = "chat" if isinstance(call.prompt, Chat) else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=self._propagator.extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "pippin",
                "gen_ai.request.model": self._model_name,
                "gen_ai.response.model": self._model_name,
                "gen_ai.response.id": call.request_id,
                **_asked(call),
            },
        )
        return SpanTrace(self._tracer, span, call.n)

    def close(self) -> None:
        """Tells what was not told yet, as far as it can be told in seconds."""
        telling = threading.Thread(target=self._provider.shutdown, daemon=True)
        telling.start()
        telling.join(_FLUSH_S)
        if telling.is_alive():
            self._exporter.shutdown()  # it would try again, for a receiver that is gone
            telling.join(_FLUSH_S)


class SpanTrace:
    """The span of a call, and those of its completions in it (`Trace`)."""

    def __init__(self, tracer: Tracer, span: Span, num_completions: int):
        self._tracer, self._span, self._num_completions = tracer, span, num_completions
        self._outputs: list[Output] = []  # the last one of each completion that ended
        self._lock = threading.Lock()
        self.trace_id = format_trace_id(span.get_span_context().trace_id)

    def finish(self, output: Output, timing: Timing) -> None:
        """See `Trace`."""
        with self._lock:
            if not self._span.is_recording():  # not wanted, or its call failed
                return
            self._outputs.append(output)
            self._tell_parts(timing)
            if len(self._outputs) < self._num_completions:
                return
            self._span.set_attributes(_told(self._outputs))
            failed = [o.finish_reason for o in self._outputs if o.finish_reason not in SUCCESS]
            self._end(failed[0].value if failed and failed[0] is not None else None)

    def fail(self, reason: str) -> None:
        """See `Trace`."""
        with self._lock:
            if self._span.is_recording():
                self._end(reason)

    def _end(self, error: str | None) -> None:
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _tell_parts(self, timing: Timing) -> None:
        now, context = time.time_ns(), set_span_in_context(self._span)

        def epoch(seconds: float) -> int:
            return now - int((timing.finished - seconds) * 1e9)

        times = [timing.arrived, timing.scheduled, timing.first_token, timing.finished]
        for name, (start, end) in zip(("queue", "prefill", "decode"), itertools.pairwise(times), strict=True):
            if start is not None:
                part = self._tracer.start_span(name, context=context, start_time=epoch(start))
                part.end(epoch(timing.finished if end is None else end))


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Tells an OTLP receiver over gRPC, such as http://127.0.0.1:4317; https: with TLS."""
    return OTLPSpanExporter(endpoint=endpoint)


def _asked(call: Call) -> dict[str, str | int | float]:
    """What a call asks for, as far as it is told."""
    if call.embeds:
        return {}
    sampling = call.sampling
    asked: dict[str, str | int | float | None] = {
        "gen_ai.request.max_tokens": call.max_tokens,
        "gen_ai.request.choice.count": call.n if call.n != 1 else None,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _told(outputs: Sequence[Output]) -> dict[str, int | Sequence[str]]:
    """How completions ended; the prompt counts once."""
    return {
        "gen_ai.response.finish_reasons": [o.finish_reason.value for o in outputs if o.finish_reason],
        "gen_ai.usage.input_tokens": max(o.usage.prompt_tokens for o in outputs),
        "gen_ai.usage.output_tokens": sum(o.usage.output_tokens for o in outputs),
        "gen_ai.usage.cache_read.input_tokens": max(o.usage.cached_tokens for o in outputs),
    }
