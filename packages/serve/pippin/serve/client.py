"""Text from a server to the terminal: `client "What is a pippin?"`, or `client --chat`.

Exit codes: 0 done; 2 the request is wrong or not allowed; 69 no server; 70 the server failed; 75 it has too much to do;
124 the time is over; 130 Ctrl-C.
"""

import argparse
import dataclasses
import os
import pathlib
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pippin.core.errors import ConfigError, PippinError
from pippin.serve.rpc.service import client_method
from pippin.v1 import inference_pb2 as pb

_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5  # doubled after each attempt, where the server does not say how long
# Through a proxy, a connection without traffic may be dropped: a long wait for the first token has none.
_CHANNEL = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000)]

_EXIT_CODES = {
    grpc.StatusCode.UNAVAILABLE: 69,
    grpc.StatusCode.INTERNAL: 70,
    grpc.StatusCode.UNKNOWN: 70,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 75,
    grpc.StatusCode.DEADLINE_EXCEEDED: 124,
    grpc.StatusCode.CANCELLED: 130,
}
_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Client:
    """Who asks a server, and how."""

    channel: grpc.Channel
    timeout_s: float  # of a request; gRPC itself would wait for ever
    metadata: Sequence[tuple[str, str]] = ()
    sleep: Callable[[float], None] = time.sleep

    def chats(self) -> bool:
        """Whether the model takes conversations.

        Raises:
            grpc.RpcError: the server could not be asked.
        """
        method = _method(self.channel, "GetModel")
        model = self._tried(
            lambda timeout_s: method(pb.GetModelRequest(), timeout=timeout_s, metadata=self.metadata)
        )
        return pb.CAPABILITY_CHAT in model.capabilities

    def generate(self, request: pb.GenerateRequest, write: Callable[[str], None]) -> str:
        """Writes the text as it comes. The result is the whole text.

        Ctrl-C ends the request on the server too, and raises KeyboardInterrupt.

        Raises:
            grpc.RpcError: it failed. Where no server was there, and nothing had come yet, it was tried again.
        """
        method, texts = _method(self.channel, "Generate"), []

        def once(timeout_s: float) -> str:
            call = method(request, timeout=timeout_s, metadata=self.metadata)
            try:
                for event in call:
                    if event.HasField("delta"):
                        texts.append(event.delta.text)
                        write(event.delta.text)
            except KeyboardInterrupt:
                call.cancel()
                raise
            return "".join(texts)

        return self._tried(once, lambda: not texts)

    def _tried[T](self, once: Callable[[float], T], again: Callable[[], bool] = lambda: True) -> T:
        """What a call gives that is made again where no server is there, as long as it may be; it gets its timeout."""
        until = time.monotonic() + self.timeout_s
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return once(max(0.001, until - time.monotonic()))
            except grpc.RpcError as error:
                wait_s = _retry_after(error) or _FIRST_WAIT_S * 2 ** (attempt - 1)
                there_is_time = attempt < _ATTEMPTS and time.monotonic() + wait_s < until
                if _code(error) is not grpc.StatusCode.UNAVAILABLE or not (again() and there_is_time):
                    raise
            self.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def printable(text: str) -> str:
    """A text that cannot steer the terminal: what a model writes is not to be trusted."""
    return "".join(
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") or c == "\u200d" else "\ufffd"
        for c in text
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="client", description="Streams a model's text to the terminal.")
    add = parser.add_argument
    add(
        "prompt", nargs="?", help="what the model is asked, or a text to continue where it takes no questions"
    )
    add("--complete", action="store_true", help="continue the prompt, although the model takes questions")
    add("--chat", action="store_true", help="a conversation; Ctrl-C ends an answer, Ctrl-D the conversation")
    add("--system", help="what a model that takes questions is told first")
    add("--address", default="127.0.0.1:50051", help="the server, HOST:PORT (%(default)s)")
    add("--timeout", type=float, default=300.0, metavar="S", help="of a request (%(default)g s)")
    add("--max-tokens", type=int, help="of output")
    add("--temperature", type=float, help="0: always the most likely token")
    add("--top-k", type=int, help="only the so many most likely tokens")
    add("--top-p", type=float, help="only the most likely tokens with this probability together")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--adapter", metavar="NAME", help="an adapter that the server has loaded")
    add("--stop", action="append", default=[], help="a text that ends the output; may be given several times")
    add("--token-file", type=pathlib.Path, help="a file with your token, else $PIPPIN_TOKEN")
    add("--ca", type=pathlib.Path, metavar="PEM", help="use TLS, with this authority")
    add("--cert", type=pathlib.Path, metavar="PEM", help="your certificate")
    add("--key", type=pathlib.Path, metavar="PEM", help="its key")
    given = parser.parse_args(argv)
    if given.chat and given.complete:
        parser.error("--chat and --complete exclude each other")
    if given.prompt is None and not given.chat:
        parser.error("give a prompt, or --chat")
    if (given.cert is None) != (given.key is None) or (given.cert is not None and given.ca is None):
        parser.error("--cert needs --key and --ca")
    return given


def open_client(given: argparse.Namespace) -> Client:
    """The client that the flags ask for.

    Raises:
        ConfigError: a file cannot be read.
    """
    if given.ca is None:
        channel = grpc.insecure_channel(given.address, _CHANNEL)
    else:
        key, certificate = (_read(path) if path else None for path in (given.key, given.cert))
        credentials = grpc.ssl_channel_credentials(_read(given.ca), key, certificate)
        channel = grpc.secure_channel(given.address, credentials, _CHANNEL)
    token = _read(given.token_file).decode().strip() if given.token_file else os.environ.get("PIPPIN_TOKEN")
    return Client(channel, given.timeout, [("authorization", f"Bearer {token}")] if token else [])


def request_of(given: argparse.Namespace) -> pb.GenerateRequest:
    """A request with the flags' parameters and no prompt."""
    # The id stays the same from attempt to attempt, so that no request is served twice.
    request = pb.GenerateRequest(request_id=secrets.token_hex(12), stop=given.stop)
    for field in ("max_tokens", "temperature", "top_k", "top_p", "seed", "adapter"):
        if (value := getattr(given, field)) is not None:
            setattr(request, field, value)
    return request


def converse(client: Client, given: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Answers what the user types until they end it. The result is the exit code."""
    messages = _system(given)
    text = given.prompt
    while True:
        try:
            text = text if text is not None else input("> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return 0
        if text.strip():
            messages.append(pb.ChatMessage(role="user", content=text))
            request = request_of(given)
            request.chat.messages.extend(messages)
            answer = _answer(client, request, write)
            if answer is None:  # it is as if it had not been asked
                messages.pop()
            else:
                messages.append(pb.ChatMessage(role="assistant", content=answer))
        text = None


def run(argv: Sequence[str] | None = None) -> int:
    """The client's program; the result is its exit code."""
    given = parse_arguments(argv)
    try:
        client = open_client(given)
        if given.chat:
            return converse(client, given, _write)
        request = request_of(given)
        if given.complete or not client.chats():
            request.text = given.prompt
        else:
            request.chat.messages.extend([*_system(given), pb.ChatMessage(role="user", content=given.prompt)])
        client.generate(request, _write)
        _write("\n")
    except PippinError as error:
        print(f"client: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"client: {_describe(error, given.address)}", file=sys.stderr)
        return _EXIT_CODES.get(_code(error), 2)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _system(given: argparse.Namespace) -> list[pb.ChatMessage]:
    return [pb.ChatMessage(role="system", content=given.system)] if given.system else []


def _method(channel: grpc.Channel, name: str) -> Any:
    return client_method(channel, pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name[name])


def _answer(client: Client, request: pb.GenerateRequest, write: Callable[[str], None]) -> str | None:
    """The model's turn; None: there was none."""
    parts: list[str] = []
    try:
        client.generate(request, lambda text: (parts.append(text), write(text))[1])
    except KeyboardInterrupt:
        write(" ...")
    except grpc.RpcError as error:
        print(f"client: {_describe(error, 'the server')}", file=sys.stderr)
    write("\n")
    return "".join(parts) or None


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _describe(error: Any, address: str) -> str:
    """A line: what is wrong, field by field, and when to come again."""
    if _code(error) is grpc.StatusCode.UNAVAILABLE and _retry_after(error) is None:
        return f"no server answers at {address} ({error.details()}). Start one, or give another --address."
    wait_s = _retry_after(error)
    return f"{error.code().name}: {error.details()}" + (f" (in {wait_s:g} s)" if wait_s else "")


def _code(error: Any) -> grpc.StatusCode:
    return error.code()


def _retry_after(error: Any) -> float | None:
    """The seconds that the server's RetryInfo says."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.seconds + info.retry_delay.nanos * 1e-9
    return None


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def main() -> int:
    """Runs the client; the result is the exit code."""
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))  # under bazel run: where the user typed it
    return run()


if __name__ == "__main__":
    sys.exit(main())
