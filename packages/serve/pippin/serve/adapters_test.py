"""Adapters of a server: loaded by registered name, used, and unloaded when nobody uses them any more; over gRPC and HTTP."""

import asyncio
import contextlib
import dataclasses
import tempfile
from pathlib import Path

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest

from pippin.core.adapter import LowRank, save_adapter
from pippin.core.errors import CheckpointError
from pippin.serve.adapters import Adapters
from pippin.serve.errors import NotFoundError, PreconditionError
from pippin.serve.testing import MODEL, Served, details_of, fake_backend, fields_of, serving, text_of
from pippin.v1 import inference_pb2 as pb

_BASE = "ba5e"


class _Slots:
    """Takes adapters of one base, and remembers where they are."""

    count = 2

    def __init__(self):
        self.held = {}

    def put(self, slot, adapter):
        if adapter.base_signature != _BASE:
            raise CheckpointError(f"{adapter.directory} was made for another model.")
        adapter.maps()
        self.held[slot] = adapter.directory.name


def _write(directory: Path, *names: str, base: str = _BASE, rank: int = 2) -> None:
    maps = {"q": LowRank(np.ones((4, rank), np.float32), np.ones((rank, 4), np.float32))}
    for name in names:
        save_adapter(directory / name, maps, base)


@pytest.fixture
def registered(tmp_path):
    _write(tmp_path, "sums", "poems", "third")
    return tmp_path


async def test_adapters_are_loaded_listed_and_unloaded(registered):
    slots = _Slots()
    adapters = Adapters(registered, slots)
    sums, poems = [await adapters.load(name) for name in ("sums", "poems")]
    assert await adapters.load("sums") is sums, "it is loaded already"
    assert sorted(slots.held.values()) == ["poems", "sums"]
    assert [a.adapter.name for a in adapters.loaded()] == ["poems", "sums"]
    assert (sums.rank, sums.adapter.slot, poems.adapter.slot) == (2, 1, 2)
    with pytest.raises(PreconditionError, match="All 2 places .* loaded are poems, sums. Unload one"):
        await adapters.load("third")
    await adapters.unload("sums")
    third = await adapters.load("third")
    assert (third.adapter.slot, slots.held[1]) == (1, "third")
    assert third.adapter.loading != sums.adapter.loading, "pages of one are not the other's"
    with pytest.raises(NotFoundError, match="'sums' is loaded"):
        await adapters.unload("sums")


async def test_an_adapter_that_is_used_keeps_its_slot_until_the_last_request_ends(registered):
    adapters = Adapters(registered, _Slots())
    await adapters.load("sums")
    users = [adapters.take("sums") for _ in range(2)]
    leaving = asyncio.create_task(adapters.unload("sums"))
    await asyncio.sleep(0)
    with pytest.raises(NotFoundError, match="no adapter 'sums' is loaded; loaded are: none"):
        adapters.take("sums")
    await adapters.load("poems")
    with pytest.raises(PreconditionError, match="or wait until the requests"):
        await adapters.load("third")
    adapters.give_back(users[0])
    await asyncio.sleep(0)
    assert not leaving.done()
    adapters.give_back(users[1])
    await leaving
    await adapters.load("third")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc",
        "a/../sums",
        "",
        ".",
        "..",
        "sums/",
        "link",
        "x" * 200,
        "sum\0s",
        "file",
        "nobody",
    ],
)
async def test_only_registered_names_are_loaded(registered, name):
    _write(registered.parent, "outside" + registered.name)
    (registered / "link").symlink_to(registered / "sums")
    (registered / "file").write_text("no adapter")
    adapters = Adapters(registered, _Slots())
    with pytest.raises(NotFoundError, match="No adapter is registered"):
        await adapters.load(name)
    assert not adapters.loaded()


async def test_what_cannot_be_loaded_takes_no_slot_and_tells_no_path(registered):
    _write(registered, "other", base="another")
    (registered / "empty").mkdir()
    (registered / "poems" / "adapter.safetensors").write_bytes(b"")
    _write(registered, "links", "binary", "letters")
    (registered / "links" / "adapter.safetensors").unlink()
    (registered / "links" / "adapter.safetensors").symlink_to(registered / "sums" / "adapter.safetensors")
    (registered / "binary" / "manifest.textproto").write_bytes(b"\xff\xfe")
    (registered / "folder" / "manifest.textproto").mkdir(parents=True)
    adapters = Adapters(registered, _Slots(), "letters")
    for _ in range(3):
        for name, match in (
            ("other", "another model"),
            ("empty", "is absent"),
            ("poems", "has 0 bytes"),
            ("links", "holds links"),
            ("binary", "not loaded: "),
            ("folder", "cannot be read"),
            ("letters", "is the name of the model"),
        ):
            with pytest.raises(PreconditionError, match=match) as error:
                await adapters.load(name)
            assert str(registered) not in str(error.value)
    await adapters.load("sums")
    await adapters.load("third")


@contextlib.asynccontextmanager
async def _served(registered: Path, **options):
    model = dataclasses.replace(MODEL, adapters=Adapters(registered, _Slots()))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short name, as sockets want it
        address = f"unix:{folder}/admin"
        async with (
            serving(fake_backend(model=model), admin_address=address, **options) as served,
            grpc.aio.insecure_channel(address) as admin,
        ):
            yield served, admin


async def _admin(served: Served, admin, method: str, /, **fields):
    return await served.method(method, admin)(getattr(pb, f"{method}Request")(**fields))


async def test_requests_with_and_without_adapters_are_served_at_once(registered):
    async with _served(registered) as (served, admin):
        loaded = await _admin(served, admin, "LoadAdapter", name="sums")
        assert (loaded.adapter.name, loaded.adapter.rank) == ("sums", 2)
        model = await served.method("GetModel")(pb.GetModelRequest())
        assert pb.CAPABILITY_ADAPTERS in model.capabilities
        # The same prompt, longer than a page: no page of one is the other's.
        prompt = "the same text " * 4
        asked = [{"adapter": "sums"} if i % 2 else {} for i in range(12)]
        answers = await asyncio.gather(
            *(served.generate(prompt, max_tokens=9, seed=1, ignore_eos=True, **a) for a in asked)
        )
        texts = [text_of(events) for events in answers]
        assert [text.isupper() for text in texts] == [bool(a) for a in asked]
        assert len(set(texts)) == 2
        await _admin(served, admin, "UnloadAdapter", name="sums")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await served.generate(adapter="sums")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields_of(error.value) == ["adapter"]
        assert (await _admin(served, admin, "ListAdapters")).adapters == []


async def test_unloading_waits_for_the_requests_that_use_it(registered):
    async with _served(registered) as (served, admin):
        await _admin(served, admin, "LoadAdapter", name="sums")
        served.runner.hold.clear()
        call = served.method("Generate")(pb.GenerateRequest(text="a", adapter="sums", max_tokens=4))
        stream = aiter(call)
        await anext(stream)  # Started
        (listed,) = (await _admin(served, admin, "ListAdapters")).adapters
        assert (listed.name, listed.num_requests) == ("sums", 1)
        unloading = asyncio.create_task(_admin(served, admin, "UnloadAdapter", name="sums"))
        while (await _admin(served, admin, "ListAdapters")).adapters:
            await asyncio.sleep(0.005)
        assert not unloading.done()
        served.runner.hold.set()
        events = [event async for event in stream]
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH
        await unloading


async def test_administrators_are_told_why_an_adapter_is_not_loaded(registered):
    _write(registered, "other", base="another")
    async with _served(registered) as (served, admin):
        for name, code in (
            ("nobody", grpc.StatusCode.NOT_FOUND),
            ("../sums", grpc.StatusCode.NOT_FOUND),
            ("other", grpc.StatusCode.FAILED_PRECONDITION),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await _admin(served, admin, "LoadAdapter", name=name)
            assert error.value.code() is code
            assert "ErrorInfo" in details_of(error.value)
            assert str(registered) not in (error.value.details() or "")


async def test_an_adapter_is_a_model_over_http(registered):
    options = {"http_port": 0, "load_adapters": ("sums",)}
    async with contextlib.AsyncExitStack() as stack:
        served, admin = await stack.enter_async_context(_served(registered, **options))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=served.url, timeout=20))
        models = (await http.get("/v1/models")).json()["data"]
        assert [(m["id"], m.get("parent")) for m in models] == [("letters", None), ("sums", "letters")]
        asked = {"prompt": "hello", "seed": 1, "max_tokens": 5}
        for name, upper in (("sums", True), ("letters", False)):
            answer = (await http.post("/v1/completions", json={**asked, "model": name})).json()
            assert (answer["model"], answer["choices"][0]["text"].isupper()) == (name, upper)
        assert 'running_lora_adapters="sums"' in (await http.get("/metrics")).text
        await _admin(served, admin, "UnloadAdapter", name="sums")
        assert 'running_lora_adapters=""' in (await http.get("/metrics")).text
        gone = await http.post("/v1/completions", json={**asked, "model": "sums"})
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "model")
        assert (await http.get("/v1/models/sums")).status_code == 404
