"""What surrounds every route: who calls, a slow reader, and how it ends."""

import ipaddress
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pippin.serve.callers import Caller, Identities
from pippin.serve.errors import SlowReaderError, let_go
from pippin.serve.frontend import take
from pippin.serve.http.disconnect import ClientGoneError
from pippin.serve.http.problem import Problem, problem_of

_SLICE_BYTES = 64 << 10


def caller_of(request: Request) -> Caller:
    """Who makes the request that is being answered."""
    return request.state.caller


class Guard:
    """Wraps an application. An error ends its own request, and says nothing of the server."""

    def __init__(
        self,
        app: ASGIApp,
        identities: Identities,
        *,
        public: Sequence[str],
        local_only: bool,
        slow_reader_timeout_s: float,
    ):
        """`public`: paths that anybody may read. `local_only`: only this machine reaches the server."""
        self._app, self._identities, self._public = app, identities, frozenset(public)
        self._asks_host = local_only and not identities.asks
        self._slow_reader_timeout_s = slow_reader_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "neither lifespan nor web sockets are spoken"
        started, abort = False, scope["state"]["abort"]
        scope["app"] = self._app  # so that a route that is not there is an exception

        async def bounded(message: Message) -> None:
            nonlocal started
            started = True
            for part in _slices(message):
                try:
                    await take(send(part), self._slow_reader_timeout_s)
                except SlowReaderError:
                    abort()
                    raise ClientGoneError from None

        try:
            self._admit(Request(scope), scope["path"])
            await self._app(scope, receive, bounded)
        except (ClientGoneError, ClientDisconnect):
            abort()
        except Exception as error:  # noqa: BLE001 - whatever it is, only this request ends
            problem = problem_of(error)
            let_go(error)
            if started:
                abort()
            else:
                await problem.response()(scope, receive, bounded)

    def _admit(self, request: Request, path: str) -> None:
        """Notes who calls. The path is what the router goes by: `request.url` also depends on what the caller says is the host.

        Raises:
            Problem: they may not.
        """
        if self._asks_host and not _is_local_name(request.headers.get("host", "")):
            # A page of another site, whose name was made to lead here.
            raise Problem(
                403,
                "This server asks nobody who they are, and answers to the names of this machine only. Call it "
                "localhost, or start it with --tokens.",
            )
        if path in self._public:
            return
        names: Callable[[], Sequence[str]] = request.state.certificate_names
        authorization = request.headers.get("authorization")
        caller = self._identities.find(
            None if authorization is None else authorization.encode("latin-1"), names
        )
        if caller is None:
            raise Problem(
                401,
                "No token that is known. Send `Authorization: Bearer TOKEN`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer", "connection": "close"},
            )
        if path.startswith("/v1/") and "inference" not in caller.roles:
            raise Problem(403, "This needs the role inference, which you do not have.", code="role")
        request.state.caller = caller


def _slices(message: Message) -> Sequence[Message]:
    """The body in pieces, so that no more than one waits for a reader."""
    body = message.get("body", b"")
    if message["type"] != "http.response.body" or len(body) <= _SLICE_BYTES:
        return [message]
    starts = range(0, len(body), _SLICE_BYTES)
    pieces = [{**message, "body": body[i : i + _SLICE_BYTES], "more_body": True} for i in starts]
    pieces[-1]["more_body"] = message.get("more_body", False)
    return pieces


def _is_local_name(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() == "localhost"
