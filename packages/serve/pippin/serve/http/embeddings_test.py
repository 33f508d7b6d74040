"""Vectors over HTTP, by a client that knows nothing of OpenAI."""

import base64

import httpx
import numpy as np
import pytest

from pippin.serve.engine.testing import hidden
from pippin.serve.errors import InvalidRequestError
from pippin.serve.http.embeddings import embed_question
from pippin.serve.request_limits import RequestLimits
from pippin.serve.testing import fake_backend, serving
from pippin.v1 import inference_pb2 as pb

PATH = "/v1/embeddings"


def vector(text: str) -> np.ndarray:
    total = np.sum([hidden(token) for token in text.encode()], axis=0, dtype=np.float64)
    return (total / np.linalg.norm(total)).astype(np.float32)


async def post(body, fake=None, **options):
    async with (
        serving(fake, http_port=0, **options) as served,
        httpx.AsyncClient(base_url=served.url, timeout=20) as http,
    ):
        return await http.post(PATH, json=body)


@pytest.mark.parametrize("given", ["hello", list(b"hello"), ["hello"], [list(b"hello")]])
async def test_a_text_or_its_ids_have_a_vector(given):
    found = (await post({"input": given, "model": "letters", "user": "u"})).json()
    (one,) = found["data"]
    assert (found["object"], found["model"], one["object"], one["index"]) == (
        "list",
        "letters",
        "embedding",
        0,
    )
    np.testing.assert_array_equal(np.float32(one["embedding"]), vector("hello"))
    assert found["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


async def test_several_are_in_their_order_and_as_base64_where_that_is_wanted():
    texts = ["hello", "there", "x" * 300]
    found = (await post({"input": texts, "encoding_format": "base64"})).json()
    for i, text in enumerate(texts):
        data = base64.b64decode(found["data"][i]["embedding"])
        np.testing.assert_array_equal(np.frombuffer(data, "<f4"), vector(text))
    assert found["usage"]["total_tokens"] == 310


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input[1]"),
        ({"input": ["a", "b" * 513]}, 400, "input[1]"),
        ({"input": [1, 999]}, 400, "input[1]"),
        ({"input": [[1], [999]]}, 400, "input[1][0]"),
        ({"input": [1, 2**40]}, 400, "input"),
        ({"input": ["a"] * 65}, 400, "input"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions"),
        ({"input": "a", "timeout": -1}, 400, "timeout"),
        ({"input": "a", "temperature": 0}, 400, "temperature"),
        ({"input": "a", "model": "other"}, 404, "model"),
    ],
)
async def test_what_is_wrong_is_named(body, status, param):
    response = await post(body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_a_timeout_that_passes_is_a_504():
    fake = fake_backend()
    fake.runner.hold.clear()
    response = await post({"input": "a", "timeout": 0.05}, fake)
    assert response.status_code == 504


async def test_the_context_bounds_a_text_and_the_limits_all_texts():
    response = await post({"input": ["a" * 512] * 3}, limits=RequestLimits(max_batch=2))
    assert response.status_code == 400 and "at most 2" in response.json()["error"]["message"]


async def test_of_a_million_texts_no_message_is_made(monkeypatch):
    made, request = [], pb.EmbedRequest
    monkeypatch.setattr(pb, "EmbedRequest", lambda: made.append(request()) or made[-1])
    with pytest.raises(InvalidRequestError, match="has 1000000 texts; at most"):
        embed_question({"input": [[1]] * 1_000_000})
    assert len(made) == 1  # what all have in common
