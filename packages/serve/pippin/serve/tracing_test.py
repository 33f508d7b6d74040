"""Traces of calls over gRPC and HTTP, in memory and by an OTLP receiver."""

import concurrent.futures
import contextlib
import json
import logging
import time

import grpc
import grpc.aio
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pippin.serve.call import Call, Chat
from pippin.serve.engine.request import FinishReason, Output, Sampling, Timing, Usage
from pippin.serve.observers import JsonFormatter
from pippin.serve.served_model import Message
from pippin.serve.testing import fake_backend, serving
from pippin.serve.tracing import Tracing
from pippin.v1 import inference_pb2 as pb

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def told():
    exporter = InMemorySpanExporter()
    return Tracing(exporter, "letters", "1"), exporter


def _call(**fields):
    return Call(**{"request_id": "r", "prompt": "hi", "sampling": Sampling(seed=7), **fields})


def _end(reason, *, prompt=5, cached=2, output=3):
    return Output("r/0", "secret", finish_reason=reason, usage=Usage(prompt, cached, output))


def test_a_call_is_a_span_of_its_callers_trace_with_what_it_waited_for(told):
    tracing, exporter = told
    trace = tracing.begin(_call(max_tokens=9, prompt=Chat((Message("user", "secret"),))), HEADERS)
    assert trace.trace_id == TRACE
    trace.finish(_end(FinishReason.LENGTH), Timing(10.0, 10.5, 12.0, 16.0))
    tracing.close()
    *parts, call = exporter.get_finished_spans()
    assert call.name == "chat letters" and call.parent.span_id == int(PARENT, 16)
    assert {s.context.trace_id for s in (*parts, call)} == {int(TRACE, 16)}
    seconds = {s.name: round((s.end_time - s.start_time) / 1e9, 3) for s in parts}
    assert seconds == {"queue": 0.5, "prefill": 1.5, "decode": 4.0}
    assert all(s.parent.span_id == call.context.span_id for s in parts)
    assert dict(call.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "pippin",
        "gen_ai.request.model": "letters",
        "gen_ai.response.model": "letters",
        "gen_ai.response.id": "r",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
    }
    assert "secret" not in "".join(span.to_json() for span in (*parts, call))


def test_the_completions_of_a_call_are_one_span_and_a_failure_is_told(told):
    tracing, exporter = told
    trace = tracing.begin(_call(n=2), {})
    trace.finish(_end(FinishReason.STOP), Timing(0.0, 0.1, 0.2, 0.3))
    assert [s.name for s in _flushed(tracing, exporter)] == ["queue", "prefill", "decode"]
    trace.finish(_end(FinishReason.DEADLINE, cached=0, output=0), Timing(0.0, None, None, 0.4))
    trace.fail("too late")  # nothing more happens
    tracing.close()
    *_, queued, call = exporter.get_finished_spans()
    assert queued.name == "queue" and call.parent is None
    assert call.attributes["gen_ai.response.finish_reasons"] == ("stop", "deadline")
    assert call.attributes["gen_ai.usage.output_tokens"] == 3
    assert call.status.status_code is StatusCode.ERROR and call.attributes["error.type"] == "deadline"


def test_who_does_not_want_to_be_sampled_is_not(told):
    tracing, exporter = told
    trace = tracing.begin(_call(), {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert trace.trace_id == TRACE  # for the log
    trace.finish(_end(FinishReason.STOP), Timing(0.0, 0.1, 0.2, 0.3))
    tracing.close()
    assert exporter.get_finished_spans() == ()


def _flushed(tracing, exporter):
    tracing._provider.force_flush()
    return exporter.get_finished_spans()


class _Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver, which decodes what is told."""

    def __init__(self):
        self.resources, self.spans = [], []

    def Export(self, request, context):
        for of_resource in request.resource_spans:
            self.resources.append({a.key: a.value.string_value for a in of_resource.resource.attributes})
            self.spans += [span for scope in of_resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def receiving():
    """A receiver and its URL."""
    receiver = _Receiver()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


async def test_a_receiver_of_otlp_gets_calls_of_grpc_and_http_and_the_log_has_their_trace(caplog):
    caplog.set_level(logging.INFO)
    fake = fake_backend()
    fake.runner.broken.add("/bad/0")
    with receiving() as (receiver, url):
        async with serving(fake, http_port=0, otlp_endpoint=url) as served:
            call = served.method("Generate")(
                pb.GenerateRequest(text="hello", max_tokens=3, request_id="one"),
                metadata=tuple(HEADERS.items()),
            )
            assert len([event async for event in call]) > 2
            async with httpx.AsyncClient(base_url=served.url) as http:
                asked = {"prompt": "hello", "max_tokens": 4, "stream": True}
                await http.post("/v1/completions", json=asked, headers=HEADERS)
                await http.post("/v1/completions", json=asked, headers={"x-request-id": "bad"})
            with pytest.raises(grpc.aio.AioRpcError):
                await served.generate("a" * 600, request_id="long")  # more than the context
        assert served.engine.load().num_running == 0
    calls = [s for s in receiver.spans if s.name == "text_completion letters"]
    told = [{a.key: a.value for a in s.attributes} for s in calls]
    assert [s.trace_id.hex() == TRACE and s.parent_span_id.hex() == PARENT for s in calls] == [
        True,
        True,
        False,
        False,
    ]
    assert [one["gen_ai.usage.output_tokens"].int_value for one in told[:2]] == [3, 4]
    assert [one["error.type"].string_value for one in told[2:]] == ["failed", "RequestError"]
    assert {r["service.name"] for r in receiver.resources} == {"pippin-serve"}
    assert sum(s.name == "decode" for s in receiver.spans) == 2
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if hasattr(r, "fields")]
    assert [line["trace_id"] for line in lines] == [s.trace_id.hex() for s in calls[:3]]


async def test_the_callers_trace_is_in_the_log_where_nobody_is_told(caplog):
    caplog.set_level(logging.INFO)
    async with serving() as served:
        for headers in (HEADERS, {"traceparent": "nonsense"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}):
            call = served.method("Generate")(
                pb.GenerateRequest(text="hello", max_tokens=1), metadata=tuple(headers.items())
            )
            assert [event async for event in call]
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [line["trace_id"] for line in lines] == [TRACE, None, None]


async def test_a_receiver_that_is_not_there_holds_nobody_up():
    async with serving(otlp_endpoint="http://127.0.0.1:9") as served:
        start = time.monotonic()
        for _ in range(20):
            await served.generate(max_tokens=2)
        assert time.monotonic() - start < 5
        start = time.monotonic()
    assert time.monotonic() - start < 10
