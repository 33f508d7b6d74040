"""The server's flags."""

import argparse
import dataclasses
import pathlib
import urllib.parse
from collections.abc import Sequence

from pippin.core.errors import ConfigError
from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.request_limits import RequestLimits
from pippin.serve.rpc.channel_limits import ChannelLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the server is run."""

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = None
    admin_address: str | None = None
    probe_address: str | None = None
    metrics_port: int | None = None
    otlp_endpoint: str | None = None
    top: bool = False
    log_format: str = "text"
    tls_cert: pathlib.Path | None = None
    tls_key: pathlib.Path | None = None
    client_ca: pathlib.Path | None = None
    tokens: pathlib.Path | None = None
    insecure: bool = False
    reflection: bool = False
    cache_mib: int = 1024
    max_context: int | None = None
    max_requests: int = 32
    chunk_tokens: int = 128
    max_drafts: int = 4
    draft_model: str | None = None
    adapters: pathlib.Path | None = None
    load_adapters: tuple[str, ...] = ()
    max_adapters: int = 8
    max_adapter_rank: int = 16
    tensor_parallel: int = 1
    weights: str = "float"
    kv_cache: str = "float"
    max_waiting: int = 256
    max_waiting_tokens: int = 131_072
    stall_s: float = 60.0
    withdraw_s: float = 2.0
    grace_s: float = 60.0
    limits: RequestLimits = dataclasses.field(default_factory=RequestLimits)
    channel_limits: ChannelLimits = dataclasses.field(default_factory=ChannelLimits)
    http_limits: HttpLimits = dataclasses.field(default_factory=HttpLimits)

    @property
    def address(self) -> str:
        """Of Inference."""
        return self._at(self.port)

    @property
    def http_address(self) -> str | None:
        """Of the OpenAI-compatible API and the page."""
        return None if self.http_port is None else self._at(self.http_port)

    @property
    def metrics_address(self) -> str | None:
        """Of Prometheus metrics."""
        return None if self.metrics_port is None else self._at(self.metrics_port)

    def _at(self, port: int) -> str:
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The flags of a command line; one that is wrong ends the program with a line that says so."""
    parser = argparse.ArgumentParser(
        prog="server", description="Serves a language model over gRPC (pippin.v1.Inference)."
    )
    defaults = Options()
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        help="a training run, a bundle, a Hugging Face directory, a GGUF file, or a known name; without it, the newest run "
        "of the default recipe",
    )
    add("--host", default=defaults.host, help="the address to listen on (%(default)s: this machine only)")
    add("--port", type=_port, default=defaults.port, help="the port of Inference and health (%(default)s)")
    add("--http-port", type=_port, help="the port of the OpenAI-compatible API and of a page to chat on")
    add(
        "--admin-address", metavar="ADDRESS", help="HOST:PORT or unix:PATH of Admin; without it there is none"
    )
    add(
        "--probe-address",
        metavar="ADDRESS",
        help="HOST:PORT of health alone, without TLS and tokens: for probes",
    )
    add("--metrics-port", type=_port, help="the port of Prometheus metrics over HTTP")
    add(
        "--otlp-endpoint",
        type=_url,
        metavar="URL",
        help="tell OpenTelemetry traces to this OTLP receiver over gRPC, such as http://127.0.0.1:4317; https: with TLS",
    )
    add("--top", action="store_true", help="draw the engine's state on the terminal, twice a second")
    add(
        "--log-format", choices=("text", "json"), default=defaults.log_format, help="of the log (%(default)s)"
    )
    add(
        "--tls-cert",
        type=pathlib.Path,
        metavar="PEM",
        help="the server's certificate; read anew when it changes",
    )
    add("--tls-key", type=pathlib.Path, metavar="PEM", help="its key")
    add("--client-ca", type=pathlib.Path, metavar="PEM", help="clients need a certificate of this authority")
    add("--tokens", type=pathlib.Path, metavar="FILE", help="who may call, a line each: SECRET ROLE TENANT")
    add("--insecure", action="store_true", help="beyond this machine too, take calls without TLS or tokens")
    add("--reflection", action="store_true", help="tell clients the services and messages")
    add("--cache-mib", type=_positive, default=defaults.cache_mib, help="of keys and values (%(default)s)")
    add(
        "--max-context", type=_positive, metavar="TOKENS", help="of prompt and output, if not the model's own"
    )
    add(
        "--max-requests", type=_positive, default=defaults.max_requests, help="served at a time (%(default)s)"
    )
    add(
        "--chunk-tokens",
        type=_positive,
        default=defaults.chunk_tokens,
        help="of prompts in a step (%(default)s)",
    )
    add(
        "--max-drafts",
        type=int,
        choices=range(17),
        metavar="N",
        default=defaults.max_drafts,
        help="guesses of an answer's next tokens in a step; they change no answer (%(default)s)",
    )
    add(
        "--draft-model",
        metavar="DIR",
        help="a smaller model with the same tokens, which guesses what is said next; without it, guesses come from the text",
    )
    add(
        "--adapters",
        type=pathlib.Path,
        metavar="DIR",
        help="a directory whose sub-directories are adapters, registered under their names; Admin loads them",
    )
    add(
        "--load-adapter", action="append", default=[], metavar="NAME", help="load it at the start; repeatable"
    )
    add(
        "--max-adapters",
        type=_positive,
        default=defaults.max_adapters,
        help="loaded at a time (%(default)s)",
    )
    add(
        "--max-adapter-rank",
        type=_positive,
        default=defaults.max_adapter_rank,
        metavar="RANK",
        help="of the largest adapter (%(default)s)",
    )
    add(
        "--tensor-parallel",
        type=_positive,
        metavar="N",
        default=defaults.tensor_parallel,
        help="devices that share the model, each with its part of every layer (%(default)s)",
    )
    add(
        "--weights",
        choices=("float", "int8"),
        default=defaults.weights,
        help="in which numbers linear maps and the embedding are kept (%(default)s: as activations)",
    )
    add(
        "--kv-cache",
        choices=("float", "int8"),
        default=defaults.kv_cache,
        help="in which numbers keys and values are kept (%(default)s: as activations)",
    )
    add(
        "--max-waiting", type=_positive, default=defaults.max_waiting, help="requests that wait (%(default)s)"
    )
    add(
        "--max-waiting-tokens",
        type=_positive,
        default=defaults.max_waiting_tokens,
        help="tokens of prompts that wait or are being computed (%(default)s)",
    )
    add("--max-tokens", type=_positive, default=defaults.limits.max_tokens, help="of output (%(default)s)")
    add(
        "--max-timeout",
        type=_some_seconds,
        default=defaults.limits.max_timeout_s,
        metavar="S",
        help="no request is served for longer (%(default)g s)",
    )
    add(
        "--slow-reader-timeout",
        type=_some_seconds,
        default=defaults.limits.slow_reader_timeout_s,
        metavar="S",
        help="a client that takes nothing for so long is dropped (%(default)g s)",
    )
    add(
        "--stall",
        type=_some_seconds,
        default=defaults.stall_s,
        metavar="S",
        help="health is NOT_SERVING after so long without progress (%(default)g s)",
    )
    add(
        "--withdraw",
        type=_seconds,
        default=defaults.withdraw_s,
        metavar="S",
        help="after SIGTERM, how long requests are still taken while health is NOT_SERVING (%(default)g s)",
    )
    add(
        "--grace",
        type=_seconds,
        default=defaults.grace_s,
        metavar="S",
        help="how long those taken may then go on (%(default)g s)",
    )
    given = parser.parse_args(argv)
    if given.load_adapter and given.adapters is None:
        parser.error("--load-adapter needs --adapters, the directory where the adapter is registered")
    return Options(
        model=given.model,
        host=given.host,
        port=given.port,
        http_port=given.http_port,
        admin_address=given.admin_address,
        probe_address=given.probe_address,
        metrics_port=given.metrics_port,
        otlp_endpoint=given.otlp_endpoint,
        top=given.top,
        log_format=given.log_format,
        tls_cert=given.tls_cert,
        tls_key=given.tls_key,
        client_ca=given.client_ca,
        tokens=given.tokens,
        insecure=given.insecure,
        reflection=given.reflection,
        cache_mib=given.cache_mib,
        max_context=given.max_context,
        max_requests=given.max_requests,
        chunk_tokens=given.chunk_tokens,
        max_drafts=given.max_drafts,
        draft_model=given.draft_model,
        adapters=given.adapters,
        load_adapters=tuple(given.load_adapter),
        max_adapters=given.max_adapters,
        max_adapter_rank=given.max_adapter_rank,
        tensor_parallel=given.tensor_parallel,
        weights=given.weights,
        kv_cache=given.kv_cache,
        max_waiting=given.max_waiting,
        max_waiting_tokens=given.max_waiting_tokens,
        stall_s=given.stall,
        withdraw_s=given.withdraw,
        grace_s=given.grace,
        limits=RequestLimits(
            max_tokens=given.max_tokens,
            max_timeout_s=given.max_timeout,
            slow_reader_timeout_s=given.slow_reader_timeout,
        ),
    )


def check_security(options: Options, remote: Sequence[str]) -> None:
    """Refuses a server that anybody could use, or on whose wire tokens could be read.

    `remote`: its addresses that other machines reach, but that of probes.

    Raises:
        ConfigError: flags do not go together, or such an address is not protected.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together. Give both.")
    if options.client_ca is not None and options.tls_cert is None:
        raise ConfigError("--client-ca needs a certificate of the server. Give --tls-cert and --tls-key.")
    if options.insecure or not remote:
        return
    if options.tokens is None and options.client_ca is None:
        raise ConfigError(
            f"{remote[0]} is open to other machines, and nobody is asked who they are. Give --tokens or --client-ca, "
            "or --insecure where the network is trusted."
        )
    if options.tls_cert is None:
        raise ConfigError(
            f"{remote[0]} is open to other machines, and tokens would cross the network in clear. "
            "Give --tls-cert and --tls-key, or --insecure where the network is trusted."
        )


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"{port} is no port; it must be from 0 (any) to 65535")
    return port


def _url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise argparse.ArgumentTypeError(f"{text} is none; it must be http://HOST:PORT or https://HOST:PORT")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be 1 or more")
    return number


def _some_seconds(text: str) -> float:
    if _seconds(text) == 0:
        raise argparse.ArgumentTypeError("it must be more than 0 seconds")
    return _seconds(text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 1000000 seconds")
    return seconds
