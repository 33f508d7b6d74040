import asyncio
import contextlib
import dataclasses
import time

import pytest

from pippin.core.errors import DataError
from pippin.serve.call import Call, TokenIds
from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import FinishReason, Output, Sampled, Sampling
from pippin.serve.engine.testing import answer
from pippin.serve.errors import (
    DrainingError,
    DuplicateError,
    QueueFullError,
    RequestError,
    SlowReaderError,
    UnfinishedError,
)
from pippin.serve.frontend import Frontend, collect, take
from pippin.serve.request_limits import RequestLimits
from pippin.serve.served_model import Regex
from pippin.serve.testing import MODEL, SlowRunner, fake_backend


@contextlib.asynccontextmanager
async def frontend(*, queue=None, model=MODEL, hold=False, step_s=0.0, **limits):
    fake = fake_backend(queue=queue, model=model, make_runner=lambda sizes: SlowRunner(sizes, step_s))
    if hold:
        fake.runner.hold.clear()
    fake.backend.engine.start()
    made = Frontend(fake.backend.engine, model, RequestLimits(**limits))
    try:
        yield made, fake.runner
    finally:
        fake.runner.hold.set()
        await asyncio.to_thread(fake.backend.engine.stop, 0.0)
        made.close()


def call(prompt="hello", request_id="r", seed=1, **fields):
    return Call(request_id=request_id, prompt=prompt, sampling=Sampling(seed=seed), **fields)


def text_for(prompt: str, count: int, seed: int = 1) -> str:
    return bytes(answer(list(prompt.encode()), count, seed)).decode()


def is_idle(front) -> bool:
    load = front.engine.load()
    return (load.num_running, load.num_waiting) == (0, 0)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_call_is_answered_in_full():
    async with frontend() as (front, _), await front.generate(call(max_tokens=40)) as generation:
        (output,) = await collect(generation)
    assert output.text == text_for("hello", 40)
    assert (output.finish_reason, output.usage.output_tokens) == (FinishReason.LENGTH, 40)


async def test_a_prompt_of_token_ids_is_taken_as_it_is():
    prompt = TokenIds(tuple(b"hello"))
    async with frontend() as (front, _), await front.generate(call(prompt, max_tokens=9)) as generation:
        (output,) = await collect(generation)
    assert output.text == text_for("hello", 9)


async def test_completions_have_seeds_of_their_own_and_the_first_has_the_calls():
    async with frontend() as (front, _), await front.generate(call(max_tokens=8, n=3)) as generation:
        texts = [output.text for output in await collect(generation)]
    assert texts[0] == text_for("hello", 8) and len(set(texts)) == 3


async def test_what_nobody_took_comes_together():
    async with frontend() as (front, _), await front.generate(call(max_tokens=40)) as generation:
        await until(lambda: is_idle(front))
        outputs = [output async for _, output in generation]
    assert len(outputs) <= 2 and "".join(o.text for o in outputs) == text_for("hello", 40)


async def test_a_reader_who_takes_nothing_is_given_up():
    async with (
        frontend(max_pending_tokens=20) as (front, _),
        await front.generate(call(max_tokens=400)) as generation,
    ):
        await until(lambda: is_idle(front))
        with pytest.raises(SlowReaderError, match="not read"):
            async for _ in generation:
                pass
        assert front.engine.load().used_pages == 0


async def test_a_write_that_takes_too_long_is_given_up():
    with pytest.raises(SlowReaderError, match=r"0\.01 s"):
        await take(asyncio.sleep(5), 0.01)


async def test_leaving_early_frees_everything():
    async with frontend(step_s=0.005) as (front, _):
        async with await front.generate(call(max_tokens=400, n=2)) as generation:
            await anext(generation)
            assert front.engine.load().num_running == 2
        load = front.engine.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        async with await front.generate(call(max_tokens=2)) as generation:  # the id is free again
            await collect(generation)


async def test_an_id_is_served_once_and_each_tenant_has_its_own():
    async with (
        frontend(hold=True) as (front, _),
        await front.generate(call(), "a"),
        await front.generate(call(), "b"),
    ):
        with pytest.raises(DuplicateError, match="'r' is being served"):
            await front.generate(call(), "a")
        assert front.engine.load().num_waiting + front.engine.load().num_running == 2


async def test_a_call_without_max_tokens_gets_what_fits():
    async with frontend(max_tokens=7) as (front, _), await front.generate(call()) as generation:
        (output,) = await collect(generation)
    assert output.usage.output_tokens == 7


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": "a" * 512}, "text", "has 512 tokens"),
        ({"prompt": "a" * 500, "max_tokens": 13}, "max_tokens", "Ask for 12 at most"),
    ],
)
async def test_what_does_not_fit_the_context_is_refused(fields, field, message):
    async with frontend() as (front, _):
        with pytest.raises(RequestError, match=message) as error:
            await front.generate(call(**fields))
        assert error.value.field == field


async def test_a_text_that_the_tokenizer_refuses_is_the_callers_mistake():
    def refuse(text):
        raise DataError("no such letters")

    async with frontend(model=dataclasses.replace(MODEL, encode=refuse)) as (front, _):
        with pytest.raises(RequestError, match="no such letters") as error:
            await front.generate(call(prompt_field="chat"))
        assert error.value.field == "chat"


async def test_texts_that_wait_for_the_tokenizer_are_bounded():
    model = dataclasses.replace(MODEL, encode=lambda text: time.sleep(0.2) or [1])
    async with frontend(model=model, max_encoding=2) as (front, _):
        calls = [asyncio.create_task(front.encode("x", "text")) for _ in range(2)]
        await asyncio.sleep(0)
        start = time.monotonic()
        with pytest.raises(QueueFullError, match="2 texts wait"):
            await front.encode("x", "text")
        assert time.monotonic() - start < 0.1
        await asyncio.gather(*calls)


@pytest.mark.parametrize("later", [False, True])
async def test_the_deadline_holds_while_a_text_is_tokenized_or_waits_for_it(later):
    model = dataclasses.replace(MODEL, encode=lambda text: time.sleep(0.3) or [1])
    async with frontend(model=model, max_encoding=3) as (front, _):
        others = [asyncio.create_task(front.encode("x", "text")) for _ in range(2 if later else 0)]
        await asyncio.sleep(0)
        start = time.monotonic()
        with pytest.raises(UnfinishedError) as error:
            await front.generate(call(timeout_s=0.05))
        assert error.value.reason is FinishReason.DEADLINE and time.monotonic() - start < 0.25
        await asyncio.gather(*others)
        async with await front.generate(call(TokenIds((1,)), max_tokens=1)) as generation:  # its id is free
            await collect(generation)


class _Letters:
    """A constraint that knows how often it was copied."""

    def __init__(self):
        self.copies = 0

    def write_mask(self, allowed):
        allowed[:] = -1

    def accept(self, token):
        return False

    def copy(self):
        self.copies += 1
        return _Letters()


async def test_a_constraint_is_compiled_once_for_all_completions():
    compiled = []

    def compile_constraint(spec):
        compiled.append(_Letters())
        return compiled[-1]

    model = dataclasses.replace(MODEL, compile_constraint=compile_constraint)
    asked = call(constraint=Regex("[a-z]+"), n=3, max_tokens=2)
    async with frontend(model=model) as (front, _), await front.generate(asked) as generation:
        assert len(await collect(generation)) == 3
    assert [one.copies for one in compiled] == [2]


async def test_log_probabilities_of_one_answer_are_bounded():
    def asking(n, logprobs, **fields):
        sampling = Sampling(seed=1, logprobs=logprobs)
        return dataclasses.replace(call(max_tokens=10, n=n, **fields), sampling=sampling)

    async with frontend(max_logprob_values=120) as (front, _):
        async with await front.generate(asking(2, 5)):
            pass
        with pytest.raises(RequestError, match="asks for 130 .* at most 120") as error:
            await front.generate(asking(1, 12))
        assert error.value.field == "logprobs"
        with pytest.raises(RequestError) as error:
            await front.generate_all([asking(1, 5), asking(2, 3, request_id="s")], "", None)
        assert error.value.field == "requests[1].logprobs"
        assert is_idle(front)


async def test_much_that_nobody_took_comes_in_slices():
    async with frontend() as (front, _):
        async with await front.generate(call(max_tokens=20)) as generation:
            top = tuple((i, -1.0) for i in range(20))
            for _ in range(600):
                generation._put(0, Output("r", "a", (Sampled(97, -1.0, top),)))
            outputs = [(await anext(generation))[1] for _ in range(12)]
        assert max(len(output.tokens) for output in outputs) == 49  # of 21 values each
        assert all(len(output.text) >= len(output.tokens) for output in outputs)


async def test_of_a_batch_all_are_taken_or_none():
    queue = QueueLimits(max_waiting=3)
    async with frontend(queue=queue, hold=True) as (front, _):
        calls = [call(request_id=str(i)) for i in range(20)]
        with pytest.raises(QueueFullError):
            await front.generate_all(calls, "", None)
        load = front.engine.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        async with await front.generate(call(request_id="0")):
            pass


async def test_an_error_in_a_batch_names_its_request():
    async with frontend() as (front, _):
        with pytest.raises(RequestError) as error:
            await front.generate_all([call(), call("a" * 512, request_id="s")], "", None)
        assert error.value.field == "requests[1].text"


@pytest.mark.parametrize("fields", [{"timeout_s": 0.05}, {}])
async def test_the_earlier_of_timeout_and_deadline_ends_a_call(fields):
    async with frontend(step_s=0.005) as (front, _):
        deadline = front.engine.clock() + (60.0 if fields else 0.05)
        async with await front.generate(call(max_tokens=500, **fields), "", deadline) as generation:
            (output,) = await collect(generation)
    assert output.finish_reason is FinishReason.DEADLINE


async def test_the_deadline_holds_while_a_step_hangs():
    async with frontend(hold=True) as (front, _):
        async with await front.generate(call(timeout_s=0.05)) as generation:
            async with asyncio.timeout(3):
                (output,) = await collect(generation)
        assert output.finish_reason is FinishReason.DEADLINE
        assert front.engine.load().used_pages == 0


async def test_a_server_that_stops_takes_nothing():
    async with frontend() as (front, _):
        front.engine.drain()
        with pytest.raises(DrainingError):
            await front.generate(call())
