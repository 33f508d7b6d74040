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

from pippin.core.errors import PippinError
from pippin.serve.addresses import is_local, require_free
from pippin.serve.backend import Backend
from pippin.serve.busy_threads import any_busy
from pippin.serve.callers import Identities, identities
from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.frontend import Frontend
from pippin.serve.http.app import make_app, make_metrics_app
from pippin.serve.http.port import HttpPort
from pippin.serve.http.port import open_port as open_http
from pippin.serve.metrics import Metrics
from pippin.serve.observers import JsonFormatter, Observers, RequestLog, Traces
from pippin.serve.options import Options, check_security, parse_options
from pippin.serve.rpc import admin, health, inference
from pippin.serve.rpc.admin import AdminService
from pippin.serve.rpc.auth import Authenticator
from pippin.serve.rpc.guard import Guard
from pippin.serve.rpc.health import HealthService
from pippin.serve.rpc.inference import InferenceService
from pippin.serve.rpc.ports import close_port, open_port
from pippin.serve.rpc.tls import server_credentials
from pippin.serve.served_model import ServedModel
from pippin.serve.tls_files import TlsFiles
from pippin.serve.top import Top
from pippin.serve.trace import BeginTrace, note_trace
from pippin.serve.version import server_version

_log = logging.getLogger(__name__)

# How long the last words of streams may take after the engine has stopped.
_FLUSH_S = 5.0


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
    metrics: HttpPort | None
    top: Top | None
    close_traces: Callable[[], None]

    async def stop(self, options: Options) -> None:
        """Ends in an order that cuts no stream within the grace.

        Clients are told to go elsewhere while requests are still taken; then none are, and those taken are finished.
        """
        self.health.withdraw()
        await asyncio.sleep(options.withdraw_s)
        await asyncio.to_thread(self.engine.stop, options.grace_s)
        self.health.close()
        flushed = [port.stop(_FLUSH_S) for port in self.ports]
        await asyncio.gather(*flushed, *(port.stop() for port in (self.http, self.metrics) if port))
        self.frontend.close()
        await asyncio.to_thread(self.close_traces)
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
    """`undo` gets what closes what was opened."""
    engine = backend.engine
    begin_trace, close_traces = _traces(options, backend.model)
    undo.callback(close_traces)
    frontend = Frontend(engine, backend.model, options.limits, begin_trace)
    undo.callback(frontend.close)
    undo.callback(engine.stop, 0.0)
    known = identities(options.tokens, certificates=options.client_ca is not None)
    looked_after = [admin.SERVICE.full_name] if options.admin_address else []
    checks = HealthService(engine, [inference.SERVICE.full_name], looked_after)
    ports, addresses = _open_grpc(options, frontend, known, checks, undo)
    metrics, top = _observe(options, backend)
    engine.start()
    for name in options.load_adapters:
        assert backend.model.adapters is not None, "checked flags"
        await backend.model.adapters.load(name)
    for port in ports:
        await port.start()
    http, metrics_port = await _open_http(options, frontend, known, checks, metrics, undo)
    return Server(engine, frontend, checks, ports, *addresses, http, metrics_port, top, close_traces)


def _open_grpc(
    options: Options,
    frontend: Frontend,
    known: Identities,
    checks: HealthService,
    undo: contextlib.AsyncExitStack,
) -> tuple[list[grpc.aio.Server], tuple[str, str | None, str | None]]:
    """The ports of gRPC, and the addresses of Inference, Admin and probes."""
    tls, timeout_s = _tls(options), options.limits.slow_reader_timeout_s
    guard, anybody = (Guard(Authenticator(who), timeout_s) for who in (known, Identities(None)))
    ports: list[grpc.aio.Server] = []

    def listen(
        address: str, guard: Guard, services: Mapping[str, grpc.GenericRpcHandler], tls: TlsFiles | None
    ) -> str:
        port, found = open_port(
            address,
            list(services.values()),
            guard,
            # Each port its own: gRPC asks each for its first certificate.
            credentials=None if tls is None or address.startswith("unix:") else server_credentials(tls),
            limits=options.channel_limits,
            reflected=list(services) if options.reflection else [],
        )
        undo.push_async_callback(close_port, port)
        ports.append(port)
        return found

    shared = {health.SERVICE.full_name: checks.handler()}
    served = {inference.SERVICE.full_name: InferenceService(frontend).handler(), **shared}
    address = listen(options.address, guard, served, tls)
    admin_address = probe_address = None
    if options.admin_address:
        service = AdminService(frontend.engine, frontend.model)
        looked_after = {admin.SERVICE.full_name: service.handler(), **shared}
        admin_address = listen(options.admin_address, guard, looked_after, tls)
    if options.probe_address:
        probe_address = listen(options.probe_address, anybody, shared, None)
    return ports, (address, admin_address, probe_address)


def _observe(options: Options, backend: Backend) -> tuple[Metrics, Top | None]:
    """Who is told what the engine does."""
    engine, name = backend.engine, backend.model.name
    metrics = Metrics(name, engine.limits.num_pages, engine.limits.page_size, backend.model.cache_dtype)
    metrics.watch(engine.load)
    if backend.model.adapters is not None:
        metrics.watch_adapters(backend.model.adapters)
    top = Top(name, engine.limits.max_requests, engine.load, engine.clock) if options.top else None
    engine.observer = Observers([metrics, Traces(), RequestLog(), *filter(None, [top])])
    return metrics, top


async def _open_http(
    options: Options,
    frontend: Frontend,
    known: Identities,
    checks: HealthService,
    metrics: Metrics,
    undo: contextlib.AsyncExitStack,
) -> tuple[HttpPort | None, HttpPort | None]:
    """The ports of the API and of metrics alone, as far as they are wanted."""
    http = metrics_port = None
    bounds, timeout_s = options.http_limits, options.limits.slow_reader_timeout_s
    if options.http_address is not None:
        local = is_local(options.http_address)
        app = make_app(frontend, known, checks.is_serving, metrics.registry, bounds, local_only=local)
        http = await open_http(app, options.http_address, _tls(options), _FLUSH_S, bounds)
        undo.push_async_callback(http.stop)
    if options.metrics_address is not None:
        app = make_metrics_app(metrics.registry, timeout_s, local_only=is_local(options.metrics_address))
        metrics_port = await open_http(app, options.metrics_address, None, _FLUSH_S, bounds)
        undo.push_async_callback(metrics_port.stop)
    return http, metrics_port


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
    if any_busy():
        # They read files, or texts of calls that have ended. Python would wait for them, or end under their hands.
        os._exit(0)
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
    from pippin.serve.model import AdapterSource, Sizes, find, open_served

    sizes = Sizes(
        cache_bytes=options.cache_mib << 20,
        max_context=options.max_context,
        max_requests=options.max_requests,
        chunk_tokens=options.chunk_tokens,
        max_drafts=options.max_drafts,
        tensor_parallel=options.tensor_parallel,
        int8_weights=options.weights == "int8",
        int8_cache=options.kv_cache == "int8",
    )
    queue = QueueLimits(
        max_waiting=options.max_waiting,
        max_waiting_tokens=options.max_waiting_tokens,
        stall_s=options.stall_s,
    )
    adapters = None
    if options.adapters is not None:
        adapters = AdapterSource(options.adapters, options.max_adapters, options.max_adapter_rank)
    path = find(options.model)
    draft = None if options.draft_model is None else find(options.draft_model)
    # Clients are told a name, and no path of this machine.
    known_name = options.model if options.model is not None and Path(options.model) != path else None
    return open_served(path, sizes, queue, known_name, adapters, draft)


def main() -> int:
    """Serves a model; the result is the exit code."""
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))  # under bazel run: where the user typed it
    return run(open_backend)


def _traces(options: Options, model: ServedModel) -> tuple[BeginTrace, Callable[[], None]]:
    """What begins the trace of a call, and what ends telling them."""
    if options.otlp_endpoint is None:
        return note_trace, lambda: None
    # Half a second to import: only where it is wanted.
    from pippin.serve.tracing import Tracing, otlp_exporter

    tracing = Tracing(otlp_exporter(options.otlp_endpoint), model.name, server_version())
    return tracing.begin, tracing.close


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
