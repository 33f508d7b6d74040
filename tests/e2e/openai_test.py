"""The openai package, which knows nothing of us, is a client of the HTTP port."""

import asyncio
import dataclasses

import openai
import pytest

from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.testing import answer
from pippin.serve.testing import LIMITS, SlowRunner, fake_backend, serving

TOKEN = "t" * 32
CHAT = {"model": "letters", "messages": [{"role": "user", "content": "hi"}], "seed": 1}


def client_of(served, **options) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", **{"api_key": TOKEN, "max_retries": 0, **options})


def text_for(prompt: str, count: int) -> str:
    return bytes(answer(list(prompt.encode()), count, 1)).decode()


async def test_a_chat_whole_and_in_chunks():
    expected = text_for("user:hi\n", 30)
    async with serving(http_port=0) as served, client_of(served) as client:
        whole = await client.chat.completions.create(**CHAT, max_completion_tokens=30)
        stream = await client.chat.completions.create(
            **CHAT, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        expected,
        "length",
    )
    assert whole.usage and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 30)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 38


async def test_embeddings():
    async with serving(http_port=0) as served, client_of(served) as client:
        told = await client.embeddings.create(model="letters", input=["hello", "there"])
        plain = await client.embeddings.create(model="letters", input="there", encoding_format="float")
    assert told.usage.total_tokens == 10 and [one.index for one in told.data] == [0, 1]
    assert told.data[1].embedding == pytest.approx(plain.data[0].embedding)
    assert sum(x * x for x in told.data[0].embedding) == pytest.approx(1.0)


async def test_a_conversation_goes_on_from_what_came_back():
    async with serving(http_port=0) as served, client_of(served) as client:
        first = await client.chat.completions.create(**CHAT, max_tokens=5)
        messages = [*CHAT["messages"], first.choices[0].message, {"role": "user", "content": "more"}]
        second = await client.chat.completions.create(**{**CHAT, "messages": messages}, max_tokens=5)
    said = first.choices[0].message.content
    assert second.choices[0].message.content == text_for(f"user:hi\nassistant:{said}\nuser:more\n", 5)


async def test_completions_n_and_stop():
    whole = text_for("hello", 40)
    async with serving(http_port=0) as served, client_of(served) as client:
        several = await client.completions.create(model="letters", prompt="hello", n=3, seed=1, max_tokens=8)
        stopped = await client.completions.create(
            model="letters", prompt="hello", seed=1, max_tokens=40, stop=[whole[5:8]]
        )
        ids = await client.completions.create(model="letters", prompt=list(b"hello"), seed=1, max_tokens=8)
    assert len({choice.text for choice in several.choices}) == 3 and several.choices[0].text == whole[:8]
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (whole[:5], "stop")
    assert ids.choices[0].text == whole[:8]


async def test_what_is_more_than_openais_fields_is_taken():
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "priority": 3,
        "timeout": 9,
    }
    async with serving(http_port=0) as served, client_of(served) as client:
        found = await client.chat.completions.create(**CHAT, max_tokens=3, extra_body=extra)
        models = [model.id async for model in client.models.list()]
    assert found.usage and found.usage.completion_tokens == 3 and models == ["letters"]


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": 99}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"model": "gpt"}, openai.NotFoundError, "model"),
        ({"extra_headers": {"authorization": "Bearer nobody"}}, openai.AuthenticationError, None),
    ],
)
async def test_errors_are_those_that_its_users_catch(tmp_path, fields, kind, param):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN} inference us\n")
    async with serving(http_port=0, tokens=tokens) as served, client_of(served) as client:
        with pytest.raises(kind) as error:
            await client.chat.completions.create(**{**CHAT, **fields})
        assert error.value.param == param and error.value.request_id is None
        await client.chat.completions.create(**CHAT, max_tokens=1)


async def test_a_full_queue_is_tried_again_as_the_server_says():
    fake = fake_backend(
        queue=QueueLimits(max_waiting=1),
        limits=dataclasses.replace(LIMITS, max_requests=1),
        make_runner=lambda limits: SlowRunner(limits, 0.01),
    )
    async with serving(fake, http_port=0) as served, client_of(served) as client:
        running = asyncio.create_task(client.chat.completions.create(**CHAT, max_tokens=60))
        async with asyncio.timeout(10):
            while not served.engine.load().num_running:
                await asyncio.sleep(0.005)
            waiting = asyncio.create_task(client.chat.completions.create(**CHAT, max_tokens=60))
            while not served.engine.load().num_waiting:
                await asyncio.sleep(0.005)
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(**CHAT)
        again = await client.with_options(max_retries=3).chat.completions.create(**CHAT, max_tokens=1)
        await asyncio.gather(running, waiting)
    assert int(full.value.response.headers["retry-after"]) >= 1 and again.choices


async def test_a_stream_that_fails_raises_and_one_that_is_left_is_ended():
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.02))
    async with serving(fake, http_port=0) as served, client_of(served) as client:
        late = await client.chat.completions.create(
            **CHAT, max_tokens=400, stream=True, extra_body={"timeout": 0.3}
        )
        with pytest.raises(openai.APIError, match="deadline"):
            async for _ in late:
                pass
        left = await client.chat.completions.create(**CHAT, max_tokens=400, stream=True)
        async for _ in left:
            break
        await left.close()
        await served.idle()
        assert served.engine.load().used_pages == 0
