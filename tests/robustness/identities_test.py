"""Who may not call, on every method of every service, over TLS and by certificates, also ones that ran out or were replaced."""

import asyncio
import ssl
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from pippin.serve.rpc.certificates import Authority
from pippin.serve.testing import Served, serving
from pippin.v1 import inference_pb2 as pb
from tests.robustness.scale import scaled

_ANN, _ROOT = "a" * 32, "r" * 32
_NO_ONE, _NOT_ALLOWED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_SERVICES = [*pb.DESCRIPTOR.services_by_name.values(), *health_pb2.DESCRIPTOR.services_by_name.values()]
_PATHS = [f"/{s.full_name}/{m.name}" for s in _SERVICES for m in s.methods] + [_REFLECTION]
# What nobody but the caller's role may open; of the rest each known caller may call all.
_OF_ADMIN = "/pippin.v1.Admin/"


@pytest.fixture
def callers(tmp_path):
    path = tmp_path / "callers"
    path.write_text(f"{_ANN} inference ann\n{_ROOT} admin ops\nx509:ann inference ann\nx509:ops admin ops\n")
    return path


async def code_of(channel: grpc.aio.Channel, path: str, token: str | None = None) -> grpc.StatusCode:
    """How a call of a method ends, or that it began."""
    metadata = None if token is None else [("authorization", f"Bearer {token}")]
    request = (
        reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        if path == _REFLECTION
        else b""
    )
    try:
        if path == _REFLECTION:
            call = channel.stream_stream(path)(iter([request]), metadata=metadata, timeout=10)
            await call.read()
        elif path.endswith(("/Generate", "/Watch")):
            call = channel.unary_stream(path)(request, metadata=metadata, timeout=10)
            if await call.read() is grpc.aio.EOF:
                return await call.code()
            call.cancel()
        else:
            await channel.unary_unary(path)(request, metadata=metadata, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def trusting(authority: Authority, pair=None) -> grpc.ChannelCredentials:
    client = [file.read_bytes() for file in reversed(pair)] if pair else (None, None)
    return grpc.ssl_channel_credentials(authority.path.read_bytes(), *client)


async def is_well(served: Served, channel: grpc.aio.Channel, token: str | None) -> None:
    """Nothing of all this was taken by the engine, and it answers."""
    assert served.engine.load().taken == 0
    assert await code_of(channel, "/pippin.v1.Inference/GetModel", token) is grpc.StatusCode.OK


@pytest.mark.parametrize("path", _PATHS)
async def test_every_method_asks_for_a_token_over_tls_and_on_both_ports(path, callers, tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.sign("server")
    options = {"tls_cert": certificate, "tls_key": key, "tokens": callers, "reflection": True}
    async with serving(admin_address="127.0.0.1:0", **options) as served:
        for address in (served.server.address, served.server.admin_address):
            there = path.startswith(_OF_ADMIN) == (address == served.server.admin_address)
            there = there or "grpc." in path
            async with grpc.aio.secure_channel(address, trusting(authority)) as channel:
                for token in (
                    None,
                    "",
                    "x" * 32,
                    _ANN[:-1],
                    _ANN + "a",
                    _ANN.upper(),
                    f"{_ANN}\t",
                    "Bearer " + _ANN,
                ):
                    if token == f"{_ANN}\t":
                        continue  # no value of a header: the client refuses it
                    code = await code_of(channel, path, token)
                    assert code is (_NO_ONE if there else grpc.StatusCode.UNIMPLEMENTED), (token, code)
                if there and path.startswith(_OF_ADMIN):
                    assert await code_of(channel, path, _ANN) is _NOT_ALLOWED
                elif there:
                    assert await code_of(channel, path, _ANN) not in (_NO_ONE, _NOT_ALLOWED)
            async with grpc.aio.insecure_channel(address) as channel:
                assert await code_of(channel, path, _ANN) is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.secure_channel(served.server.address, trusting(authority)) as channel:
            await is_well(served, channel, _ANN)


async def test_certificates_that_ran_out_are_not_yet_there_or_of_others_open_nothing(callers, tmp_path):
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    certificate, key = authority.sign("server")
    ann = authority.sign("ann")
    eve = stranger.sign("ann", "eve")
    wrong = [authority.sign("ann", f"ann{days}", days=days) for days in (-3, 3)]
    options = {"tls_cert": certificate, "tls_key": key, "client_ca": authority.path, "tokens": callers}
    async with serving(http_port=0, reflection=True, **options) as served:
        for pair in (None, eve, *wrong):
            for path in _PATHS[:2] + _PATHS[-3:]:
                async with grpc.aio.secure_channel(
                    served.server.address, trusting(authority, pair)
                ) as channel:
                    assert await code_of(channel, path) is grpc.StatusCode.UNAVAILABLE, (pair, path)
                    assert await code_of(channel, path, _ANN) is grpc.StatusCode.UNAVAILABLE, (
                        "a token is no certificate"
                    )
            context = ssl.create_default_context(cafile=str(authority.path))
            if pair is not None:
                context.load_cert_chain(*pair)
            assert served.server.http is not None
            host, _, port = served.server.http.address.rpartition(":")
            with pytest.raises((ssl.SSLError, ConnectionError, EOFError, asyncio.IncompleteReadError)):
                reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
                writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                try:
                    if not await reader.read(1):
                        raise ConnectionError("closed")
                finally:
                    writer.transport.abort()
        async with grpc.aio.secure_channel(served.server.address, trusting(authority, ann)) as channel:
            await is_well(served, channel, None)


async def test_a_certificate_is_replaced_again_and_again_under_traffic(callers, tmp_path, monkeypatch):
    """Streams go on, new connections get the new one, and halves of a pair do no harm."""
    monkeypatch.setattr("pippin.serve.watched_file._CHECK_S", 0.0)
    authority = Authority(tmp_path)
    certificate, key = authority.sign("server")
    async with serving(tls_cert=certificate, tls_key=key, tokens=callers) as served:
        failures: list[grpc.StatusCode] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                options = [("grpc.use_local_subchannel_pool", 1)]
                async with grpc.aio.secure_channel(
                    served.server.address, trusting(authority), options
                ) as channel:
                    code = await code_of(channel, "/pippin.v1.Inference/GetModel", _ANN)
                    if code is not grpc.StatusCode.OK:
                        failures.append(code)

        clients = [asyncio.create_task(client()) for _ in range(3)]
        for i in range(scaled(10, 500)):
            new = [path.read_bytes() for path in authority.sign("server", "new")]
            certificate.write_bytes(new[0])
            if i % 3 == 0:
                await asyncio.sleep(0.02)  # a certificate and another's key
            key.write_bytes(b"")
            key.write_bytes(new[1])
            await asyncio.sleep(0.03)
        stop.set()
        await asyncio.gather(*clients)
    assert not failures


async def test_a_token_that_is_taken_away_is_refused_soon_and_no_file_opens_the_server(callers):
    async with serving(tokens=callers) as served:
        path = "/pippin.v1.Inference/GetModel"
        assert await code_of(served.channel, path, _ANN) is grpc.StatusCode.OK
        for text in ("", "\x00" * 100, "not a line\n", f"{_ROOT} admin ops\n"):
            callers.write_text(text)
            await asyncio.sleep(1.1)
            gone = text.startswith(_ROOT)
            assert await code_of(served.channel, path, _ANN) is (_NO_ONE if gone else grpc.StatusCode.OK)
            assert await code_of(served.channel, path) is _NO_ONE
        callers.unlink()
        await asyncio.sleep(1.1)
        assert await code_of(served.channel, path) is _NO_ONE
        assert await code_of(served.channel, path, _ROOT) is _NOT_ALLOWED


async def test_the_time_of_a_refusal_says_nothing_of_the_token(callers):
    """Its comparison is over digests, and with all: no letter that is right makes it longer."""
    times: dict[str, list[float]] = {"nearly": [], "nothing": []}
    async with serving(tokens=callers) as served:
        for _ in range(scaled(200, 10_000)):
            for name, token in (("nearly", _ANN[:-1] + "b"), ("nothing", "z" * 32)):
                start = time.perf_counter()
                await code_of(served.channel, "/pippin.v1.Inference/GetModel", token)
                times[name].append(time.perf_counter() - start)
    nearly, nothing = (sorted(values)[len(values) // 2] for values in times.values())
    assert abs(nearly - nothing) < 0.3 * max(nearly, nothing)
