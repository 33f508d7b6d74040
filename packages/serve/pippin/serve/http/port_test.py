"""Connections: who goes, who is slow, who may not."""

import asyncio
import contextlib
import json
import ssl

import httpx
import pytest

from pippin.core.errors import ConfigError
from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.request_limits import RequestLimits
from pippin.serve.rpc.certificates import Authority
from pippin.serve.testing import SlowRunner, fake_backend, serving

ANN, ROOT = "a" * 32, "r" * 32
PATHS = ["/v1/models", "/v1/models/letters", "/load", "/health", "/metrics", "/none"]


@contextlib.asynccontextmanager
async def connection(served):
    """Bytes to and from the HTTP port."""
    host, _, port = served.server.http.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def post(body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def ended(reader) -> bytes:
    """What comes until the connection ends."""
    data = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                data += piece
    return data


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_frees_what_it_held_within_a_step(stream):
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.05))
    async with serving(fake, http_port=0) as served:
        async with connection(served) as (_, writer):
            writer.write(post({"prompt": "hello", "max_tokens": 400, "stream": stream, "n": 2}))
            while served.engine.load().generated < 4:
                await asyncio.sleep(0.005)
            assert served.engine.load().num_running == 2
        steps = served.engine.load().steps
        await served.idle()
        assert served.engine.load().steps <= steps + 1 and served.engine.load().used_pages == 0


async def test_a_client_that_goes_while_it_waits_frees_its_place():
    fake = fake_backend()
    fake.runner.hold.clear()
    async with serving(fake, http_port=0) as served:
        async with connection(served) as (_, writer):
            writer.write(post({"prompt": "hello"}))
            while not served.engine.load().num_running + served.engine.load().num_waiting:
                await asyncio.sleep(0.005)
        fake.runner.hold.set()
        await served.idle()


async def test_a_reader_who_takes_nothing_is_cut():
    limits = RequestLimits(slow_reader_timeout_s=0.3)
    async with serving(http_port=0, limits=limits) as served:
        async with connection(served) as (_, writer):
            # Answers to more requests than its window and the buffers hold.
            for _ in range(2000):
                writer.write(b"GET /page.js HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await asyncio.sleep(1.5)
            assert not served.server.http.num_connections
        assert (await get(served, "/health")).status_code == 200


async def get(served, path, **options):
    async with httpx.AsyncClient(base_url=served.url, **options) as http:
        return await http.get(path)


@pytest.mark.parametrize("path", [b"/metrics", b"/v1/models"])
async def test_what_a_caller_says_is_the_host_opens_no_path(path, tmp_path):
    (tmp_path / "callers").write_text(f"{ANN} inference ann\n")
    async with serving(http_port=0, tokens=tmp_path / "callers") as served:
        for host in (b"localhost", b"localhost/page.css?", b"localhost/page.css#"):
            async with connection(served) as (reader, writer):
                writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: " + host + b"\r\n\r\n")
                assert (await ended(reader)).startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))


async def test_the_port_of_metrics_has_nothing_else_and_is_bounded(tmp_path):
    (tmp_path / "callers").write_text(f"{ANN} inference ann\n")
    limits = HttpLimits(max_connections=2)
    async with serving(metrics_port=0, tokens=tmp_path / "callers", http_limits=limits) as served:
        async with httpx.AsyncClient(base_url=f"http://{served.server.metrics.address}") as http:
            assert "pippin:num_requests_running" in (await http.get("/metrics")).text
            assert (await http.get("/load")).status_code == 404
            assert (await http.get("/metrics", headers={"host": "evil.example"})).status_code == 403
        host, _, port = served.server.metrics.address.rpartition(":")
        others = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=f"http://{served.server.metrics.address}") as http:
            assert (await http.get("/metrics")).status_code == 503
        for _, writer in others:
            writer.transport.abort()


async def test_who_only_scrapes_may_not_infer(tmp_path):
    (tmp_path / "callers").write_text(f"{ANN} metrics scraper\n")
    async with serving(http_port=0, tokens=tmp_path / "callers") as served:
        headers = {"authorization": f"Bearer {ANN}"}
        assert (await get(served, "/metrics", headers=headers)).status_code == 200
        assert (await get(served, "/v1/models", headers=headers)).status_code == 403


@pytest.mark.parametrize("before", [b"", b"GET /load HTTP/1.1\r\nhost: localhost\r\n\r\n"])
@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\n"])
async def test_headers_that_do_not_come_end_the_connection(before, head):
    limits = HttpLimits(header_timeout_s=0.2, keepalive_s=1)
    async with serving(http_port=0, http_limits=limits) as served, connection(served) as (reader, writer):
        writer.write(before)
        await asyncio.sleep(0.1)
        writer.write(head)
        await ended(reader)


async def test_headers_that_are_too_large_are_refused():
    async with serving(http_port=0) as served, connection(served) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (1 << 16))
        assert (await ended(reader)).startswith(b"HTTP/1.1 400")


async def test_a_body_that_does_not_come_is_given_up():
    limits = HttpLimits(body_timeout_s=0.2)
    async with serving(http_port=0, http_limits=limits) as served, connection(served) as (reader, writer):
        writer.write(post({"prompt": "hello"})[:-5])
        assert (await ended(reader)).startswith(b"HTTP/1.1 408")


async def test_connections_beyond_the_limit_are_told_so():
    async with serving(http_port=0, http_limits=HttpLimits(max_connections=1)) as served:
        async with connection(served):
            await asyncio.sleep(0.05)
            assert (await get(served, "/health")).status_code == 503
        await asyncio.sleep(0.05)
        assert (await get(served, "/health")).status_code == 200


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"{ANN} inference ann\n{ROOT} admin ops\n")
    return path


@pytest.mark.parametrize("path", PATHS)
async def test_every_path_asks_who_calls(tokens, path):
    async with serving(http_port=0, tokens=tokens) as served:
        for shown in (None, "Bearer x", "Bearer", ANN, f"Basic {ANN}", "Bearer \xff"):
            headers = {} if shown is None else {"authorization": shown.encode("latin-1")}
            response = await get(served, path, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        known = await get(served, path, headers={"authorization": f"bearer {ANN}"})
        assert known.status_code == (404 if path == "/none" else 200)


async def test_a_caller_needs_the_role_of_a_path(tokens):
    async with serving(http_port=0, tokens=tokens) as served:
        headers = {"authorization": f"Bearer {ROOT}"}
        assert (await get(served, "/v1/models", headers=headers)).status_code == 403
        assert (await get(served, "/load", headers=headers)).status_code == 200


async def test_the_page_can_be_read_by_who_then_gives_a_token(tokens):
    async with serving(http_port=0, tokens=tokens) as served:
        assert (await get(served, "/")).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil", 403),
    ],
)
async def test_a_name_that_was_made_to_lead_here_is_not_answered(host, status):
    async with serving(http_port=0) as served:
        assert (await get(served, "/load", headers={"host": host})).status_code == status


def context_of(authority, certificate=None):
    context = ssl.create_default_context(cafile=str(authority.path))
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


async def test_certificates_of_both_sides_and_their_renewal(tmp_path, monkeypatch):
    monkeypatch.setattr("pippin.serve.watched_file._CHECK_S", 0.0)
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    certificate, key = authority.sign("server")
    tokens = tmp_path / "tokens"
    tokens.write_text("x509:ann inference ann\nx509:root admin ops\n")
    ann, root, bob = (authority.sign(name) for name in ("ann", "root", "bob"))
    options = {"tls_cert": certificate, "tls_key": key, "client_ca": authority.path, "tokens": tokens}
    async with serving(http_port=0, **options) as served:
        url = f"https://{served.server.http.address}"

        async def status(shown, path="/v1/models", trusted=authority):
            async with httpx.AsyncClient(verify=context_of(trusted, shown)) as http:
                return (await http.get(url + path)).status_code

        assert [await status(ann), await status(bob), await status(root)] == [200, 200, 403]
        with pytest.raises(httpx.TransportError):
            await status(None)
        with pytest.raises(httpx.TransportError):
            await status(other.sign("eve"))
        with pytest.raises(httpx.ConnectError, match="verify"):
            await status(ann, trusted=other)
        other.sign("server")  # in place of the first
        assert await status(ann, trusted=other) == 200


async def test_an_address_that_is_taken_is_refused():
    async with serving(http_port=0) as served:
        port = int(served.server.http.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="could not be opened"):
            async with serving(http_port=port):
                pass


async def test_what_is_being_told_is_told_to_its_end_at_a_stop():
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.01))
    async with serving(fake, http_port=0) as served, connection(served) as (reader, writer):
        writer.write(post({"prompt": "hello", "max_tokens": 100, "stream": True}))
        while served.engine.load().generated < 4:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(served.engine.stop, 5.0)
        await served.server.http.stop()
        assert b"data: [DONE]" in await ended(reader)
