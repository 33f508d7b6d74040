"""Serves a model over gRPC and HTTP until SIGTERM."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import grpc
import grpc.aio
from prometheus_client import start_http_server

from pippin.core.errors import ConfigError, PippinError
from pippin.serve.addresses import is_local, require_free
from pippin.serve.callers import Identities, identities
from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.frontend import Frontend
from pippin.serve.http.app import make_app
from pippin.serve.http.port import HttpPort
from pippin.serve.http.port import open_port as open_http
from pippin.serve.metrics import Metrics
from pippin.serve.observers import JsonFormatter, Observers, RequestLog
from pippin.serve.options import Options, check_security, parse_options
from pippin.serve.rpc import admin, health, inference
from pippin.serve.rpc.admin import AdminService
from pippin.serve.rpc.auth import Authenticator
from pippin.serve.rpc.guard import Guard
from pippin.serve.rpc.health import HealthService
from pippin.serve.rpc.inference import InferenceService
from pippin.serve.rpc.ports import open_port
from pippin.serve.rpc.tls import server_credentials
from pippin.serve.served_model import ServedModel
from pippin.serve.tls_files import TlsFiles
from pippin.serve.top import Top

_log = logging.getLogger(__name__)

# How long the last words of streams may take after the engine has stopped.
_FLUSH_S = 5.0


@dataclasses.dataclass(frozen=True)
class Backend:
    """What is served: an engine that was not started, and what is known of its model."""

    engine: Engine
    model: ServedModel


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs."""

    engine: Engine
    frontend: Frontend
    health: HealthService
    ports: Sequence[grpc.aio.Server]
    # With the ports that they got.
    address: str
    admin_address: str | None
    probe_address: str | None
    http: HttpPort | None
    metrics_address: str | None
    close_metrics: Callable[[], None]
    top: Top | None

    async def stop(self, options: Options) -> None:
        """Ends in an order that cuts no stream within the grace.

        Clients are told to go elsewhere while requests are still taken; then none are, and those taken are finished.
        """
        self.health.withdraw()
        await asyncio.sleep(options.withdraw_s)
        await asyncio.to_thread(self.engine.stop, options.grace_s)
        self.health.close()
        flushed = [port.stop(_FLUSH_S) for port in self.ports]
        await asyncio.gather(*flushed, *([self.http.stop()] if self.http else []))
        self.frontend.close()
        self.close_metrics()
        if self.top is not None:
            self.top.stop()


async def start(options: Options, backend: Backend) -> Server:
    """A server that answers on all its addresses.

    Raises:
        ConfigError: an address or a file is wrong. Nothing of it is left.
    """
    async with contextlib.AsyncExitStack() as undo:
        server = await _start(options, backend, undo)
        undo.pop_all()
    return server


async def _start(options: Options, backend: Backend, undo: contextlib.AsyncExitStack) -> Server:
    engine, limits = backend.engine, options.limits
    frontend = Frontend(engine, backend.model, limits)
    tls = _tls(options)
    known = identities(options.tokens, certificates=options.client_ca is not None)
    guard = Guard(Authenticator(known), limits.slow_reader_timeout_s)
    names = [inference.SERVICE.full_name]
    checks = HealthService(engine, names, [admin.SERVICE.full_name] if options.admin_address else [])
    ports: list[grpc.aio.Server] = []

    def listen(
        address: str, guard: Guard, services: Mapping[str, grpc.GenericRpcHandler], tls: TlsFiles | None
    ):
        port, found = open_port(
            address,
            list(services.values()),
            guard,
            # Each port its own: gRPC asks each for its first certificate.
            credentials=None if tls is None or address.startswith("unix:") else server_credentials(tls),
            limits=options.channel_limits,
            reflected=list(services) if options.reflection else [],
        )
        undo.push_async_callback(port.stop, None)
        ports.append(port)
        return found

    shared = {health.SERVICE.full_name: checks.handler()}
    served = {inference.SERVICE.full_name: InferenceService(frontend).handler(), **shared}
    address = listen(options.address, guard, served, tls)
    admin_address = probe_address = None
    if options.admin_address:
        looked_after = {admin.SERVICE.full_name: AdminService(engine).handler(), **shared}
        admin_address = listen(options.admin_address, guard, looked_after, tls)
    if options.probe_address:
        anybody = Guard(Authenticator(Identities(None)), limits.slow_reader_timeout_s)
        probe_address = listen(options.probe_address, anybody, shared, None)
    metrics = Metrics(backend.model.name, engine.limits.num_pages, engine.limits.page_size)
    metrics.watch(engine.load)
    top = (
        Top(backend.model.name, engine.limits.max_requests, engine.load, engine.clock)
        if options.top
        else None
    )
    engine.observer = Observers([metrics, RequestLog(), *filter(None, [top])])
    metrics_address, close_metrics = _serve_metrics(options, metrics)
    undo.callback(close_metrics)
    engine.start()
    undo.callback(engine.stop, 0.0)
    for port in ports:
        await port.start()
    http = None
    if options.http_address is not None:
        local, bounds = is_local(options.http_address), options.http_limits
        app = make_app(frontend, known, checks.is_serving, metrics.registry, bounds, local_only=local)
        http = await open_http(app, options.http_address, tls, _FLUSH_S, bounds)
    return Server(
        engine,
        frontend,
        checks,
        ports,
        address,
        admin_address,
        probe_address,
        http,
        metrics_address,
        close_metrics,
        top,
    )


async def serve(options: Options, backend: Backend, began: float) -> None:
    """Serves until SIGTERM or SIGINT; the second one ends the process at once."""
    asked = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    server = await start(options, backend)
    _print(f"READY {server.address} {backend.model.name} {time.monotonic() - began:.1f} s")
    if server.http is not None:
        _print(f"HTTP {'http' if options.tls_cert is None else 'https'}://{server.http.address}/")
    if server.top is not None:
        server.top.start()
    await asked.wait()
    load = backend.engine.load()
    _log.info("stopping: %d requests run and %d wait", load.num_running, load.num_waiting)
    await server.stop(options)


def run(open_backend: Callable[[Options], Backend], argv: Sequence[str] | None = None) -> int:
    """The server's program; the result is its exit code. A user's mistake is one line, without a stack trace."""
    began = time.monotonic()
    options = parse_options(argv)
    _start_log(options)
    try:
        addresses = [options.address, *filter(None, [options.http_address, options.admin_address])]
        others = [options.probe_address, options.metrics_address]
        check_security(options, [a for a in addresses if not is_local(a)])
        for address in [*addresses, *filter(None, others)]:
            require_free(address)  # before the model is read, which takes a while
        _check_files(options)
        asyncio.run(serve(options, open_backend(options), began))
    except PippinError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2
    finally:
        _flush_all()
    return 0


def _print(line: str) -> None:
    """Prints a line. A server whose output nobody takes, or for which there is no room, serves all the same."""
    try:
        print(line, flush=True)
    except OSError as error:
        _log.warning("what this program prints goes nowhere from now on: %s", error.strerror)
        _to_nowhere(sys.stdout)


def _flush_all() -> None:
    """Gives up what cannot be written at the end: Python would exit with another code than ours."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _start_log(options: Options) -> None:
    """Logs to standard error. Where that shows the engine at a glance, only what is wrong is logged."""
    handler = logging.StreamHandler()
    if options.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING if options.top else logging.INFO, handlers=[handler])
    logging.getLogger("jax").setLevel(logging.WARNING)


def open_backend(options: Options) -> Backend:
    """The model that the flags name, with its programs compiled.

    Raises:
        PippinError: there is none, or it cannot be served, or it does not fit.
    """
    # JAX takes seconds to import: wrong flags are told before.
    from pippin.serve.model import Sizes, find, open_served

    sizes = Sizes(
        cache_bytes=options.cache_mib << 20,
        max_context=options.max_context,
        max_requests=options.max_requests,
        chunk_tokens=options.chunk_tokens,
        max_drafts=options.max_drafts,
    )
    queue = QueueLimits(
        max_waiting=options.max_waiting,
        max_waiting_tokens=options.max_waiting_tokens,
        stall_s=options.stall_s,
    )
    path = find(options.model)
    # Clients are told a name, and no path of this machine.
    known_name = options.model if options.model is not None and Path(options.model) != path else None
    opened = open_served(path, sizes, queue, known_name)
    return Backend(opened.engine, opened.served)


def main() -> int:
    """Serves a model; the result is the exit code."""
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))  # under bazel run: where the user typed it
    return run(open_backend)


def _serve_metrics(options: Options, metrics: Metrics) -> tuple[str | None, Callable[[], None]]:
    """The address of the metrics, and what ends them: a thread of their own answers."""
    if options.metrics_port is None:
        return None, lambda: None
    try:
        httpd, thread = start_http_server(options.metrics_port, options.host, metrics.registry)
    except OSError:  # between the check and now
        raise ConfigError(
            f"{options.metrics_address} could not be opened. Choose another --metrics-port."
        ) from None

    def close() -> None:
        httpd.shutdown()
        httpd.server_close()
        thread.join()

    return f"{options.host}:{httpd.server_port}", close


def _check_files(options: Options) -> None:
    """Raises ConfigError where tokens or certificates are wrong."""
    identities(options.tokens, certificates=False)
    if (tls := _tls(options)) is not None:
        server_credentials(tls)


def _tls(options: Options) -> TlsFiles | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    return TlsFiles(options.tls_cert, options.tls_key, options.client_ca)


if __name__ == "__main__":
    sys.exit(main())
