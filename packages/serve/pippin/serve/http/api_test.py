"""The API over loopback, by a client that knows nothing of OpenAI."""

import asyncio
import contextlib
import dataclasses
import json
import time

import httpx
import pytest

from pippin.core.errors import DataError
from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import Sampled
from pippin.serve.engine.testing import FakeRunner, answer
from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.request_limits import RequestLimits
from pippin.serve.testing import LIMITS, MODEL, SlowRunner, fake_backend, serving

CHAT = {"messages": [{"role": "user", "content": "hi"}], "seed": 1}
HELLO = {"prompt": "hello", "seed": 1}
COMPLETIONS = "/v1/completions"


def text_for(prompt: str, count: int, seed: int = 1) -> str:
    return bytes(answer(list(prompt.encode()), count, seed)).decode()


@contextlib.asynccontextmanager
async def client(fake=None, **options):
    """A server, and a client of its HTTP port."""
    async with (
        serving(fake, http_port=0, **options) as served,
        httpx.AsyncClient(base_url=served.url, timeout=20) as http,
    ):
        yield served, http


def error_of(response: httpx.Response) -> dict:
    assert set(response.json()) == {"error"}
    return response.json()["error"]


def events_of(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]


async def test_a_completion_says_the_same_whole_and_in_chunks():
    async with client() as (_, http):
        whole = (await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 20, "n": 2})).json()
        stream = await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 20, "n": 2, "stream": True})
    *events, done = events_of(stream)
    told = ["", ""]
    for event in map(json.loads, events):
        (choice,) = event["choices"]
        told[choice["index"]] += choice["text"]
    assert done == "[DONE]" and told == [choice["text"] for choice in whole["choices"]]
    assert told[0] == text_for("hello", 20) and told[0] != told[1]
    assert whole["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 40,
        "total_tokens": 45,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_several_prompts_are_answered_in_their_order():
    async with client() as (_, http):
        prompts = {"prompt": ["hello", "there"], "n": 2, "max_tokens": 5, "seed": 1}
        found = (await http.post(COMPLETIONS, json=prompts)).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert (texts[0], texts[2]) == (text_for("hello", 5), text_for("there", 5))
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (10, 20)


async def test_a_request_id_comes_back_and_is_not_taken_twice():
    fake = fake_backend()
    fake.runner.hold.clear()
    headers = {"x-request-id": "abc"}
    async with client(fake) as (served, http):
        first = asyncio.create_task(http.post(COMPLETIONS, json={**HELLO, "max_tokens": 1}, headers=headers))
        while not served.engine.load().num_running + served.engine.load().num_waiting:
            await asyncio.sleep(0.005)
        second = await http.post(COMPLETIONS, json=HELLO, headers=headers)
        fake.runner.hold.set()
        response = await first
    assert (second.status_code, error_of(second)["code"]) == (409, "duplicate_request_id")
    assert response.headers["x-request-id"] == "abc" and response.json()["id"] == "cmpl-abc"


@pytest.mark.parametrize(
    ("path", "content", "status", "said"),
    [
        (COMPLETIONS, b'{"prompt": "a", ', 400, "not JSON"),
        (COMPLETIONS, b"[1]", 400, "JSON object"),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
        (COMPLETIONS, b'{"a":' + b"[" * 5000, 400, "deeper than 64"),
        (COMPLETIONS, b'{"prompt": "a", "n": 99}', 400, "n: is 99; must be from 1 to 16"),
        (COMPLETIONS, b'{"prompt": "a", "\\ud800": 1}', 400, "\\ud800: is no field"),
        (COMPLETIONS, b'{"prompt": [' + b'"a",' * 99 + b'"a"]}', 400, "prompt: holds 100 prompts"),
        (
            COMPLETIONS,
            b'{"prompt": [' + b'"a",' * 60 + b'"a"], "stop": ["' + b"a" * 99_999 + b'"]}',
            400,
            "one by one",
        ),
        (COMPLETIONS, b'{"prompt": ""}', 400, "prompt: must not be empty"),
        (COMPLETIONS, b'{"prompt": [1, 999]}', 400, "prompt[1]: token id 999"),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": 600}', 400, "max_tokens: is 600"),
        (COMPLETIONS, b'{"prompt": "a", "model": "other"}', 404, "letters"),
        (COMPLETIONS, b'{"prompt": "a", "response_format": {"type": "json_object"}}', 400, "format"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "messages: must hold 1 to 1024 messages, not 0"),
        ("/v1/none", b"{}", 404, "Not Found"),
        ("/v1/models", b"{}", 405, "Not Allowed"),
        ("/", b"{}", 405, "Not Allowed"),
    ],
)
async def test_what_cannot_be_answered_is_an_error_of_openais_form(path, content, status, said):
    async with client() as (_, http):
        response = await http.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == status and said in error_of(response)["message"]
        assert (await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 1})).status_code == 200


async def test_another_type_of_body_is_refused():
    async with client() as (_, http):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
            response = await http.post(COMPLETIONS, content=b"{}", headers={"content-type": kind})
            assert response.status_code == 415


async def test_a_body_that_is_too_large_is_refused():
    async def pieces():
        for _ in range(11):
            yield b" " * 1000

    limits = HttpLimits(max_body_bytes=10_000)
    async with client(http_limits=limits) as (_, http):
        kind = {"content-type": "application/json"}
        told = await http.post(COMPLETIONS, content=b" " * 10_001, headers=kind)
        untold = await http.post(COMPLETIONS, content=pieces(), headers=kind)
    assert told.status_code == untold.status_code == 413
    assert error_of(told)["code"] == error_of(untold)["code"] == "too_large"


async def test_a_full_queue_says_when_to_come_again():
    fake = fake_backend(queue=QueueLimits(max_waiting=1), limits=dataclasses.replace(LIMITS, max_requests=1))
    fake.runner.hold.clear()
    async with client(fake) as (served, http):
        taken = []
        for busy in ((1, 0), (1, 1)):
            taken.append(asyncio.create_task(http.post(COMPLETIONS, json={**HELLO, "max_tokens": 2})))
            async with asyncio.timeout(10):
                while (served.engine.load().num_running, served.engine.load().num_waiting) != busy:
                    await asyncio.sleep(0.005)
        began = time.monotonic()
        full = await http.post(COMPLETIONS, json=HELLO)
        seconds = time.monotonic() - began
        fake.runner.hold.set()
        assert [(await response).status_code for response in taken] == [200, 200]
    assert (full.status_code, error_of(full)["code"]) == (429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1 and seconds < 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_that_passes_before_the_first_token_is_a_504(stream):
    fake = fake_backend()
    fake.runner.hold.clear()
    async with client(fake) as (_, http):
        response = await http.post(COMPLETIONS, json={**HELLO, "timeout": 0.05, "stream": stream})
        fake.runner.hold.set()
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline")


async def test_a_deadline_that_passes_later_ends_the_stream_with_an_error():
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.02))
    async with client(fake) as (served, http):
        request = {**HELLO, "timeout": 0.3, "stream": True, "max_tokens": 400}
        *told, last = events_of(await http.post(COMPLETIONS, json=request))
        await served.idle()
    assert told and json.loads(last)["error"]["code"] == "deadline"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_says_nothing_of_the_server(stream):
    fake = fake_backend()
    fake.runner.broken.add("/bad/0")
    async with client(fake) as (_, http):
        request = {**HELLO, "stream": stream}
        response = await http.post(COMPLETIONS, json=request, headers={"x-request-id": "bad"})
        assert (await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 1})).status_code == 200
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"
    assert "step" not in response.text and "Traceback" not in response.text


async def test_an_error_that_nobody_thought_of_has_an_id_and_no_text(caplog):
    def encode(text):
        raise KeyError("the secret")

    async with client(fake_backend(model=dataclasses.replace(MODEL, encode=encode))) as (_, http):
        response = await http.post(COMPLETIONS, json=HELLO)
    message = error_of(response)["message"]
    assert response.status_code == 500 and "secret" not in message
    assert message.split()[-1].rstrip(".") in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}},
            "response_format.json_schema.schema",
        ),
        ("structured_outputs", {"regex": "("}, "structured_outputs.regex"),
        ("structured_outputs", {"choice": ["a", "a"]}, "structured_outputs.choice"),
    ],
)
async def test_a_format_that_cannot_be_held_is_named(field, value, param):
    def compile_constraint(spec):
        raise DataError("cannot be compiled.")

    model = dataclasses.replace(MODEL, compile_constraint=compile_constraint)
    async with client(fake_backend(model=model)) as (_, http):
        response = await http.post("/v1/chat/completions", json={**CHAT, field: value})
    assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_a_server_that_drains_takes_no_more():
    async with client() as (served, http):
        served.engine.drain()
        response = await http.post(COMPLETIONS, json=HELLO)
        health = await http.get("/health")
    assert (response.status_code, error_of(response)["code"]) == (503, "draining")
    assert response.headers["retry-after"] == "1" and health.status_code == 503


@pytest.mark.parametrize("lacks", ["encode", "encode_chat"])
async def test_what_the_model_cannot_do_is_said(lacks):
    model = dataclasses.replace(MODEL, **{lacks: None})
    async with client(fake_backend(model=model)) as (_, http):
        response = await http.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, error_of(response)["code"]) == (400, "unsupported")


class Telling(FakeRunner):
    """Tells log-probabilities."""

    def _sample(self, row):
        return [
            Sampled(one.token, -0.5, ((one.token, -0.5), (0xC3, float("-inf"))))
            for one in super()._sample(row)
        ]


async def test_log_probabilities_are_told_as_openai_does():
    async with client(fake_backend(make_runner=Telling)) as (_, http):
        wanted = {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}
        chat = (await http.post("/v1/chat/completions", json={**CHAT, **wanted})).json()["choices"][0]
        text = (await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 2, "logprobs": 2})).json()[
            "choices"
        ][0]
    first = chat["logprobs"]["content"][0]
    assert first["token"] == chat["message"]["content"][0] and first["logprob"] == -0.5
    assert first["bytes"] == list(first["token"].encode())
    assert first["top_logprobs"][1] == {"token": "\ufffd", "bytes": [0xC3], "logprob": -9999.0}
    assert "".join(text["logprobs"]["tokens"]) == text["text"] and text["logprobs"]["text_offset"] == [0, 1]
    assert text["logprobs"]["token_logprobs"] == [-0.5, -0.5]


async def test_log_probabilities_of_one_answer_are_bounded():
    async with client(limits=RequestLimits(max_logprob_values=99)) as (_, http):
        wanted = {"max_tokens": 20, "logprobs": True, "top_logprobs": 4}
        chat = await http.post("/v1/chat/completions", json={**CHAT, **wanted})
        two = {"prompt": ["a", "b"], "max_tokens": 10, "logprobs": 4}
        texts = await http.post(COMPLETIONS, json=two)
    assert (chat.status_code, error_of(chat)["param"]) == (400, "top_logprobs")
    assert (texts.status_code, error_of(texts)["param"]) == (400, "logprobs")


async def test_the_state_of_the_server():
    async with client() as (_, http):
        await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 7})
        load = (await http.get("/load")).json()
        metrics = (await http.get("/metrics")).text
        models = (await http.get("/v1/models")).json()["data"]
        assert (await http.get("/v1/models/letters")).json() == models[0]
        assert (await http.get("/v1/models/none")).status_code == 404
    assert load["generated_tokens"] == 7 and load["serving"] and load["cache_usage"] == 0
    assert "pippin:num_requests_waiting" in metrics and models[0]["id"] == "letters"


async def test_the_page_may_load_nothing_from_elsewhere():
    async with client() as (_, http):
        for path in ("/", "/page.css", "/page.js"):
            response = await http.get(path)
            assert response.status_code == 200 and "://" not in response.text
            assert response.headers["content-security-policy"].startswith("default-src 'none';")


async def test_the_longest_answer_is_bounded_as_over_grpc():
    async with client(limits=RequestLimits(max_tokens=5)) as (_, http):
        assert (await http.post(COMPLETIONS, json={**HELLO, "max_tokens": 6})).status_code == 400
        found = (await http.post(COMPLETIONS, json=HELLO)).json()
    assert found["usage"]["completion_tokens"] == 5
