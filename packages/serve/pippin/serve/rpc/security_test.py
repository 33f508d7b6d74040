"""Who may call what, over the wire."""

import hashlib
import hmac
import pathlib
import tempfile

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pippin.core.errors import ConfigError
from pippin.serve.callers import read_callers
from pippin.serve.rpc.certificates import Authority
from pippin.serve.rpc.tls import server_credentials
from pippin.serve.testing import serving
from pippin.serve.tls_files import TlsFiles
from pippin.v1 import inference_pb2 as pb

ANN, ROOT = "a" * 32, "r" * 32
DENIED, FORBIDDEN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
METHODS = {
    **{m.name: m for m in pb.DESCRIPTOR.services_by_name["Inference"].methods},
    **{m.name: m for m in health_pb2.DESCRIPTOR.services_by_name["Health"].methods},
}
ADMIN = [m.name for m in pb.DESCRIPTOR.services_by_name["Admin"].methods]


@pytest.fixture
def socket_folder():
    """A folder whose path is short enough for sockets, as a sandbox's are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield pathlib.Path(folder)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    digest = hashlib.sha256(ROOT.encode()).hexdigest()
    path.write_text(f"# callers\n\n{ANN} inference ann\nsha256:{digest} admin ops\n")
    return path


def bearer(token):
    return [("authorization", f"Bearer {token}")]


async def outcome(call) -> grpc.StatusCode:
    """How a call ended."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall):
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def request_for(name):
    return (METHODS[name].input_type._concrete_class)()


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_asks_who_calls(tokens, name):
    async with serving(tokens=tokens) as served:
        method, request = served.method(name), request_for(name)
        for metadata in (None, bearer("x" * 32), bearer(""), [("authorization", ANN)]):
            assert await outcome(method(request, metadata=metadata)) is DENIED
        assert await outcome(method(request, metadata=bearer(ANN))) is not DENIED


async def test_reflection_asks_too(tokens):
    async with serving(tokens=tokens, reflection=True) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        assert await outcome(stub.ServerReflectionInfo(iter(requests))) is DENIED
        call = stub.ServerReflectionInfo(iter(requests), metadata=bearer(ANN))
        assert await outcome(call) is grpc.StatusCode.OK


async def test_a_role_opens_its_service_only(tokens, socket_folder):
    address = f"unix:{socket_folder}/admin"
    async with (
        serving(tokens=tokens, admin_address=address) as served,
        grpc.aio.insecure_channel(address) as channel,
    ):
        for name in ADMIN:
            method, request = served.method(name, channel), getattr(pb, f"{name}Request")()
            assert await outcome(method(request)) is DENIED
            assert await outcome(method(request, metadata=bearer(ANN))) is FORBIDDEN
            assert await outcome(method(request, metadata=bearer(ROOT))) not in (DENIED, FORBIDDEN)
        model = served.method("GetModel")
        assert await outcome(model(pb.GetModelRequest(), metadata=bearer(ROOT))) is FORBIDDEN


async def test_who_is_denied_is_so_before_their_bytes_are_read(tokens):
    async with serving(tokens=tokens) as served:
        call = served.channel.unary_unary("/pippin.v1.Inference/Tokenize")(b"\xff\xff")
        assert await outcome(call) is DENIED


async def test_probes_need_no_token_where_they_have_an_address(tokens):
    async with serving(tokens=tokens, probe_address="127.0.0.1:0") as served:
        channel = grpc.aio.insecure_channel(served.server.probe_address)
        check = served.method("Check", channel)(health_pb2.HealthCheckRequest())
        assert await outcome(check) is grpc.StatusCode.OK
        model = served.method("GetModel", channel)(pb.GetModelRequest())
        assert await outcome(model) is grpc.StatusCode.UNIMPLEMENTED
        await channel.close()


async def test_tokens_are_read_anew(tokens, monkeypatch):
    monkeypatch.setattr("pippin.serve.watched_file._CHECK_S", 0.0)
    async with serving(tokens=tokens) as served:
        call = served.method("GetModel")
        assert await outcome(call(pb.GetModelRequest(), metadata=bearer(ANN))) is grpc.StatusCode.OK
        tokens.write_text(f"{'b' * 40} inference ann\n")
        assert await outcome(call(pb.GetModelRequest(), metadata=bearer(ANN))) is DENIED
        assert await outcome(call(pb.GetModelRequest(), metadata=bearer("b" * 40))) is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no caller"),
        ("short inference ann", "can be guessed"),
        (f"{ANN} inference", "line 1"),
        (f"{ANN} root ann", "line 1"),
        ("sha256:xyz admin ann", "64 hexadecimal"),
    ],
)
def test_a_wrong_line_is_named_without_its_secret(tmp_path, text, message):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_callers(path)
    assert ANN not in str(error.value)


def secure(served, authority, client=None):
    pair = [file.read_bytes() for file in reversed(client)] if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes(), *pair)
    return grpc.aio.secure_channel(served.server.address, credentials)


async def model_over(served, channel):
    return await outcome(served.method("GetModel", channel)(pb.GetModelRequest(), timeout=5))


async def test_tls_takes_only_what_is_encrypted(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.sign("server")
    async with serving(tls_cert=certificate, tls_key=key) as served:
        async with secure(served, authority) as channel:
            assert await model_over(served, channel) is grpc.StatusCode.OK
        async with secure(served, Authority(tmp_path, "other")) as channel:
            assert await model_over(served, channel) is grpc.StatusCode.UNAVAILABLE
        assert await model_over(served, served.channel) is grpc.StatusCode.UNAVAILABLE


async def test_a_new_certificate_is_used_without_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr("pippin.serve.watched_file._CHECK_S", 0.0)
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    certificate, key = old.sign("server")
    async with serving(tls_cert=certificate, tls_key=key) as served, secure(served, old) as before:
        assert await model_over(served, before) is grpc.StatusCode.OK
        new.sign("server")
        async with secure(served, new) as after:
            assert await model_over(served, after) is grpc.StatusCode.OK
        assert await model_over(served, before) is grpc.StatusCode.OK, "what is open stays"


async def test_clients_need_a_certificate_where_an_authority_is_named(tmp_path, tokens):
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    certificate, key = authority.sign("server")
    tokens.write_text("x509:ops inference,admin ops\n")
    files = {"tls_cert": certificate, "tls_key": key, "client_ca": authority.path, "tokens": tokens}
    async with serving(**files, admin_address="127.0.0.1:0") as served:
        async with secure(served, authority) as channel:
            assert await model_over(served, channel) is grpc.StatusCode.UNAVAILABLE
        async with secure(served, authority, stranger.sign("ann", "bad")) as channel:
            assert await model_over(served, channel) is grpc.StatusCode.UNAVAILABLE
        async with secure(served, authority, authority.sign("ann")) as channel:
            assert await model_over(served, channel) is grpc.StatusCode.OK
        for name, expected in (("ann", FORBIDDEN), ("ops", grpc.StatusCode.OK)):
            pair = [file.read_bytes() for file in reversed(authority.sign(name))]
            credentials = grpc.ssl_channel_credentials(authority.path.read_bytes(), *pair)
            async with grpc.aio.secure_channel(served.server.admin_address, credentials) as channel:
                call = served.method("GetLoad", channel)(pb.GetLoadRequest(), timeout=5)
                assert await outcome(call) is expected


def test_files_that_are_no_pair_are_refused(tmp_path):
    authority = Authority(tmp_path)
    certificate, _ = authority.sign("a")
    _, key = authority.sign("b")
    with pytest.raises(ConfigError, match="belong together"):
        server_credentials(TlsFiles(certificate, key))
    with pytest.raises(ConfigError, match="not a file"):
        server_credentials(TlsFiles(tmp_path / "none", key))


def test_all_tokens_are_compared_whichever_is_right(tmp_path, monkeypatch):
    path = tmp_path / "tokens"
    path.write_text("".join(f"{i:032d} inference t{i}\n" for i in range(9)))
    callers, compared = read_callers(path), []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(1) or compare(a, b))
    found = [callers.with_token(token.encode()) for token in (f"{0:032d}", f"{8:032d}", "x")]
    assert [caller and caller.tenant for caller in found] == ["t0", "t8", None]
    assert len(compared) == 27
