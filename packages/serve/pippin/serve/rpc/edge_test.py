"""The services over loopback, as a client sees them."""

import asyncio
import pathlib
import tempfile
import time

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.testing import answer, hidden
from pippin.serve.request_limits import RequestLimits
from pippin.serve.testing import SlowRunner, details_of, fails_with, fake_backend, fields_of, serving, text_of
from pippin.v1 import inference_pb2 as pb

INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def socket_folder():
    """A folder whose path is short enough for sockets, as a sandbox's are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield pathlib.Path(folder)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def is_idle(served) -> bool:
    load = served.engine.load()
    return (load.num_running, load.num_waiting) == (0, 0)


async def test_a_stream_is_a_start_then_deltas_then_one_end_for_each_completion():
    async with serving() as served:
        events = await served.generate("hello", max_tokens=20, n=2, seed=5)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds.count("started") == 1
    assert events[0].started.prompt_tokens == 5 and events[0].started.seed == 5
    ends = [e.finished for e in events if e.HasField("finished")]
    assert sorted(end.index for end in ends) == [0, 1]
    for end in ends:
        assert (end.finish_reason, end.usage.output_tokens) == (pb.FINISH_REASON_LENGTH, 20)
    assert text_of(events) == bytes(answer(b"hello", 20, 5)).decode() != text_of(events, 1)
    told = [t for e in events if e.HasField("delta") and e.delta.index == 0 for t in e.delta.token_ids]
    assert told == answer(b"hello", 20, 5)


async def test_a_stop_is_told_and_left_out():
    whole = bytes(answer(b"hello", 30, 5)).decode()
    async with serving() as served:
        events = await served.generate("hello", seed=5, stop=[whole[10:12]])
    end = events[-1].finished
    assert (end.finish_reason, end.matched_text) == (pb.FINISH_REASON_STOP, whole[10:12])
    assert text_of(events) == whole[:10]


async def test_a_seed_that_was_told_gives_the_same_text():
    async with serving() as served:
        events = await served.generate(max_tokens=9)
        again = await served.generate(max_tokens=9, seed=events[0].started.seed)
    assert text_of(events) == text_of(again)


async def test_a_batch_is_answered_in_its_order():
    texts = ["a", "bb", "ccc"]
    requests = [pb.GenerateRequest(text=t, seed=1, n=2, max_tokens=100) for t in texts]
    async with serving() as served:
        response = await served.method("GenerateBatch")(pb.GenerateBatchRequest(requests=requests))
    firsts = [result.completions[0] for result in response.results]
    assert [c.text.encode() for c in firsts] == [bytes(answer(t.encode(), 100, 1)) for t in texts]
    assert [c.finished.usage.prompt_tokens for c in firsts] == [1, 2, 3]
    assert all(len(result.completions) == 2 for result in response.results)


async def test_one_failure_in_a_batch_stays_one():
    fake = fake_backend()
    fake.runner.broken.add("/bad/0")
    requests = [pb.GenerateRequest(text="a", max_tokens=5, request_id=name) for name in ("good", "bad")]
    async with serving(fake) as served:
        response = await served.method("GenerateBatch")(pb.GenerateBatchRequest(requests=requests))
    reasons = [result.completions[0].finished.finish_reason for result in response.results]
    assert reasons == [pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_FAILED]


async def test_tokens_are_counted_as_they_would_be_taken():
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    async with serving() as served:
        response = await served.method("Tokenize")(pb.TokenizeRequest(text="hé"))
        count = await served.method("CountTokens")(pb.CountTokensRequest(chat=chat))
        events = [e async for e in served.method("Generate")(pb.GenerateRequest(chat=chat, max_tokens=1))]
    assert bytes(response.token_ids).decode() == "hé"
    assert count.num_tokens == events[0].started.prompt_tokens == len("user:hi\n")


async def test_the_model_claims_what_it_can_and_no_more():
    async with serving() as served:
        model = await served.method("GetModel")(pb.GetModelRequest())
        can = [pb.CAPABILITY_TEXT, pb.CAPABILITY_CHAT, pb.CAPABILITY_EMBED]
        assert list(model.capabilities) == can
        assert model.limits.max_logprob_values == 1 << 18
        assert (model.name, model.context_length, model.limits.max_n) == ("letters", 512, 16)
        assert (model.weights_dtype, model.cache_dtype, model.num_devices) == ("float32", "float32", 1)
        async with fails_with(grpc.StatusCode.UNIMPLEMENTED) as error:
            await served.generate(regex="a+")
        assert details_of(error[0])["ErrorInfo"].reason == "UNSUPPORTED"


async def test_a_text_has_a_vector_of_length_1():
    text = "a text of more than one step " * 10
    async with serving() as served:
        embed = served.method("Embed")
        told = await embed(pb.EmbedRequest(text=text))
        ids = pb.TokenIds(ids=text.encode())
        again, other = await asyncio.gather(
            embed(pb.EmbedRequest(token_ids=ids)), embed(pb.EmbedRequest(text="b"))
        )
    expected = np.sum([hidden(token) for token in text.encode()], axis=0, dtype=np.float64)
    np.testing.assert_allclose(told.values, expected / np.linalg.norm(expected), rtol=1e-6)
    assert told == again and told.prompt_tokens == len(text)
    assert list(other.values) != list(told.values)


async def test_what_is_wrong_with_a_text_to_embed_is_told_by_path():
    async with serving() as served:
        embed = served.method("Embed")
        for request, fields in (
            (pb.EmbedRequest(), ["input"]),
            (pb.EmbedRequest(text=""), ["text"]),
            (pb.EmbedRequest(text="a" * 513), ["text"]),
            (pb.EmbedRequest(token_ids=pb.TokenIds(ids=[1, 999])), ["token_ids.ids[1]"]),
            (pb.EmbedRequest(text="a", priority=101, timeout=Duration(seconds=-1)), ["priority", "timeout"]),
        ):
            async with fails_with(INVALID) as error:
                await embed(request)
            assert fields_of(error[0]) == fields
        assert (await embed(pb.EmbedRequest(text="a" * 512))).prompt_tokens == 512


async def test_embedding_has_deadlines_and_queues_as_generating_has():
    fake = fake_backend(queue=QueueLimits(max_waiting=1))
    fake.runner.hold.clear()
    async with serving(fake) as served:
        embed = served.method("Embed")
        async with fails_with(grpc.StatusCode.DEADLINE_EXCEEDED):
            await embed(pb.EmbedRequest(text="a", timeout=Duration(nanos=50_000_000)))
        calls = [embed(pb.EmbedRequest(text="a")) for _ in range(12)]
        codes = [asyncio.ensure_future(call.code()) for call in calls]
        refused, _ = await asyncio.wait(codes, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert {code.result() for code in refused} == {EXHAUSTED}
        calls[0].cancel()
        fake.runner.hold.set()
        found = set(await asyncio.gather(*codes))
        assert found == {EXHAUSTED, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK}
        await served.idle()


async def test_all_that_is_wrong_with_a_request_is_told_by_path():
    async with serving() as served:
        async with fails_with(INVALID) as error:
            await served.generate(temperature=float("nan"), max_tokens=-1, stop=[""])
        assert fields_of(error[0]) == ["max_tokens", "temperature", "stop[0]"]
        async with fails_with(INVALID) as error:
            await served.generate("a" * 600)
        assert fields_of(error[0]) == ["text"]


async def test_an_error_with_very_much_to_say_arrives():
    async with serving() as served:
        async with fails_with(INVALID) as error:
            await served.generate(logit_bias={1000 + i: float("nan") for i in range(300)})
        paths = fields_of(error[0])
        assert 20 < len(paths) < 300 and paths[0] == "logit_bias[1000]"
        async with fails_with(INVALID) as error:
            await served.generate(request_id="é" * 100_000)
        assert fields_of(error[0]) == ["request_id"]


MALFORMED = {
    "damaged": b"\x12\xff\xff",
    "text that is not UTF-8": b"\x12\x02\xff\xfe",
    "nested too deep": b"\x0b" * 200,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize(
    "method",
    [
        "/pippin.v1.Inference/Generate",
        "/pippin.v1.Inference/GenerateBatch",
        "/pippin.v1.Inference/Tokenize",
    ],
)
async def test_bytes_that_are_no_message_are_refused(method, data):
    async with serving() as served:
        call = served.channel.unary_stream if method.endswith("Generate") else served.channel.unary_unary
        async with fails_with(INVALID) as error:
            response = call(method)(data if not method.endswith("Batch") else b"\x0a\x03" + data[:3])
            _ = [e async for e in response] if method.endswith("Generate") else await response
        assert fields_of(error[0]) == [""]
        assert "pars" not in (error[0].details() or "").lower()


async def test_health_and_reflection_refuse_bytes_that_are_no_message():
    async with serving(reflection=True) as served:
        async with fails_with(INVALID):
            await served.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\x0a\x02\xff\xfe")
        stream = served.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        async with fails_with(INVALID):
            _ = [e async for e in stream(iter([b"\x0a\x02\xff\xfe"]))]


@settings(max_examples=5, deadline=None)
@given(st.lists(st.binary(max_size=300), min_size=100, max_size=100))
def test_random_bytes_never_break_the_server(messages):
    async def send_all() -> None:
        async with serving(limits=RequestLimits(max_tokens=2)) as served:
            for data in messages:
                try:
                    _ = [e async for e in served.channel.unary_stream("/pippin.v1.Inference/Generate")(data)]
                except grpc.aio.AioRpcError as error:
                    assert error.code() in (INVALID, EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED), error
            await until(lambda: is_idle(served))
            assert text_of(await served.generate(max_tokens=2, seed=1))

    asyncio.run(send_all())


async def test_a_message_that_is_too_large_is_refused():
    async with serving() as served, fails_with(EXHAUSTED):
        await served.generate("a" * (5 << 20))


async def test_a_header_that_is_too_large_is_refused():
    async with serving() as served:
        async with fails_with(EXHAUSTED):
            await served.method("GetModel")(pb.GetModelRequest(), metadata=[("x", "y" * (64 << 10))])
        assert (await served.method("GetModel")(pb.GetModelRequest())).name == "letters"


async def test_a_full_queue_says_so_at_once_and_when_to_come_again():
    fake = fake_backend(queue=QueueLimits(max_waiting=2))
    fake.runner.hold.clear()
    async with serving(fake) as served:
        calls = [served.method("Generate")(pb.GenerateRequest(text="a", max_tokens=1)) for _ in range(12)]
        refused = []
        for call in calls:
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                refused.append(error)
        assert refused and all(error.code() is EXHAUSTED for error in refused)
        start = time.monotonic()
        async with fails_with(EXHAUSTED):
            await served.generate()
        assert time.monotonic() - start < 0.5, "a few ms, on a machine with nothing else to do"
        details = details_of(refused[0])
        assert details["RetryInfo"].retry_delay.seconds >= 1 and details["QuotaFailure"].violations
        fake.runner.hold.set()
        await until(lambda: is_idle(served))


async def test_an_id_that_is_served_is_not_served_twice():
    fake = fake_backend()
    fake.runner.hold.clear()
    async with serving(fake) as served:
        first = served.method("Generate")(pb.GenerateRequest(text="a", request_id="x"))
        assert (await first.read()).started.request_id == "x"
        async with fails_with(grpc.StatusCode.ALREADY_EXISTS) as error:
            await served.generate(request_id="x")
        assert details_of(error[0])["ErrorInfo"].reason == "DUPLICATE_REQUEST_ID"
        first.cancel()
        await until(lambda: is_idle(served))


@pytest.mark.parametrize("taken", [0, 1, 5])
async def test_a_call_that_is_cancelled_frees_all_it_held(taken):
    fake = fake_backend()
    async with serving(fake) as served:
        call = served.method("Generate")(pb.GenerateRequest(text="hello", max_tokens=500, n=3))
        for _ in range(taken):
            await call.read()
        fake.runner.hold.clear()
        call.cancel()
        await until(lambda: is_idle(served))
        fake.runner.hold.set()
        assert served.engine.load().num_waiting == 0


async def test_a_client_that_is_gone_frees_all_it_held():
    async with serving() as served:
        channel = grpc.aio.insecure_channel(served.server.address)
        call = served.method("Generate", channel)(pb.GenerateRequest(text="hello", max_tokens=500))
        await call.read()
        await channel.close()
        await until(lambda: is_idle(served))


@pytest.mark.parametrize("by", ["timeout", "deadline"])
@pytest.mark.parametrize("stage", ["queue", "decode"])
async def test_a_deadline_is_told_as_one(by, stage):
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.005))
    async with serving(fake) as served:
        if stage == "queue":
            fake.runner.hold.clear()
        # Long enough for two tokens on a busy machine, and not for 500.
        fields = {"timeout": Duration(seconds=1)} if by == "timeout" else {}
        request = pb.GenerateRequest(text="hello", max_tokens=500, **fields)
        call = served.method("Generate")(request, timeout=1.0 if by == "deadline" else 30)
        if stage == "decode":
            await call.read()
            await call.read()
        events = []
        async with fails_with(grpc.StatusCode.DEADLINE_EXCEEDED):
            while (event := await call.read()) is not grpc.aio.EOF:
                events.append(event)
        if by == "timeout":
            assert events[-1].finished.finish_reason == pb.FINISH_REASON_DEADLINE
        await until(lambda: is_idle(served))


async def test_the_engines_failure_is_told_without_its_reason():
    fake = fake_backend()
    fake.runner.broken.add("/x/0")
    async with serving(fake) as served:
        async with fails_with(grpc.StatusCode.INTERNAL) as error:
            await served.generate(request_id="x")
        assert "the step of" not in str(error[0])
        assert text_of(await served.generate(max_tokens=3))


async def test_an_unknown_error_is_told_as_an_id_that_the_log_has(caplog, monkeypatch):
    async with serving() as served:

        def fail(*_):
            raise KeyError("secret of the server")

        monkeypatch.setattr(served.engine, "submit", fail)
        async with fails_with(grpc.StatusCode.INTERNAL) as error:
            await served.generate()
    text = error[0].details() or ""
    assert "secret" not in str(error[0])
    assert text.split()[-1].rstrip(".") in caplog.text and "secret of the server" in caplog.text


async def test_a_slow_reader_is_dropped_and_its_engine_freed():
    limits = RequestLimits(slow_reader_timeout_s=0.3, max_n=16)
    async with serving(limits=limits) as served:
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(served.server.address, options=options) as channel:
            calls = [
                served.method("Generate", channel)(pb.GenerateRequest(text="hello", max_tokens=400, n=16))
                for _ in range(2)
            ]
            await asyncio.gather(*(call.read() for call in calls))
            await until(lambda: is_idle(served))
        assert text_of(await served.generate(max_tokens=2))


async def test_many_calls_at_once_are_all_answered_as_if_alone():
    async with serving() as served:
        texts = [f"prompt {i}" for i in range(40)]
        all_events = await asyncio.gather(*(served.generate(t, max_tokens=16, seed=3) for t in texts))
    for text, events in zip(texts, all_events, strict=True):
        assert text_of(events).encode() == bytes(answer(text.encode(), 16, 3))


async def test_health_follows_the_engine():
    async with serving(admin_address="127.0.0.1:0") as served:
        check, watch = served.method("Check"), served.method("Watch")
        for name in ("", "pippin.v1.Inference", "pippin.v1.Admin"):
            assert (await check(health_pb2.HealthCheckRequest(service=name))).status == 1
        async with fails_with(grpc.StatusCode.NOT_FOUND):
            await check(health_pb2.HealthCheckRequest(service="x"))
        unknown = watch(health_pb2.HealthCheckRequest(service="x"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        stream = watch(health_pb2.HealthCheckRequest(service="pippin.v1.Inference"))
        assert (await stream.read()).status == health_pb2.HealthCheckResponse.SERVING
        served.engine.drain()
        assert (await stream.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        listed = await served.method("List")(health_pb2.HealthListRequest())
        assert {name: s.status for name, s in listed.statuses.items()} == {
            "": 2,
            "pippin.v1.Inference": 2,
            "pippin.v1.Admin": 1,
        }


async def test_health_sees_an_engine_that_hangs():
    fake = fake_backend(queue=QueueLimits(stall_s=0.2))
    fake.runner.hold.clear()
    async with serving(fake) as served:
        call = served.method("Generate")(pb.GenerateRequest(text="a", max_tokens=1))
        stream = served.method("Watch")(health_pb2.HealthCheckRequest())
        statuses = [(await stream.read()).status for _ in range(2)]
        assert statuses == [1, 2]
        fake.runner.hold.set()
        assert (await stream.read()).status == 1
        assert [e async for e in call]


async def test_admin_is_nowhere_but_on_its_own_address(socket_folder):
    address = f"unix:{socket_folder}/admin.sock"
    async with serving(admin_address=address) as served:
        async with fails_with(grpc.StatusCode.UNIMPLEMENTED):
            await served.method("GetLoad")(pb.GetLoadRequest())
        assert (socket_folder / "admin.sock").stat().st_mode & 0o777 == 0o600
        async with grpc.aio.insecure_channel(address) as channel:
            load = await served.method("GetLoad", channel)(pb.GetLoadRequest())
            assert (load.state, load.num_pages) == (pb.SERVER_STATE_READY, 64)
            for name in ("ListAdapters", "LoadAdapter", "UnloadAdapter", "Reload"):
                request = getattr(pb, f"{name}Request")()
                async with fails_with(grpc.StatusCode.UNIMPLEMENTED):
                    await served.method(name, channel)(request)
            async with fails_with(grpc.StatusCode.UNIMPLEMENTED):
                await served.method("GetModel", channel)(pb.GetModelRequest())
            await served.method("Drain", channel)(pb.DrainRequest())
            load = await served.method("GetLoad", channel)(pb.GetLoadRequest())
            assert load.state == pb.SERVER_STATE_DRAINING
        async with fails_with(grpc.StatusCode.UNAVAILABLE) as error:
            await served.generate()
        assert details_of(error[0])["RetryInfo"] == error_details_pb2.RetryInfo(
            retry_delay=Duration(seconds=1)
        )


@pytest.mark.parametrize("on", [False, True])
async def test_reflection_is_there_only_when_asked_for(on):
    async with serving(reflection=on) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        if on:
            (response,) = [r async for r in call]
            names = {s.name for s in response.list_services_response.service}
            assert names == {
                "pippin.v1.Inference",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
        else:
            async with fails_with(grpc.StatusCode.UNIMPLEMENTED):
                _ = [r async for r in call]
