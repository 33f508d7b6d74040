"""Prometheus metrics of the engine, named as vLLM names its own, with `pippin:` before.

A gateway that knows vLLM's names needs only the prefix: queue, running and cache use are what it routes by.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pippin.serve.adapters import Adapters
from pippin.serve.engine.engine import Load
from pippin.serve.engine.request import FinishReason, Output, Request, Timing

_LABELS = ["model_name"]
# Seconds: from a token of a small model to a request of minutes.
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)
_REQUEST_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    40.0,
    60.0,
    120.0,
    300.0,
    900.0,
)
_COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """What the engine tells (`Observer`), and its load when somebody looks."""

    def __init__(self, model_name: str, num_pages: int, page_size: int, cache_dtype: str = "float32"):
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._first_token = self._seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = self._seconds("inter_token_latency_seconds", "Between two tokens.", _TOKEN_BUCKETS)
        self._per_token = self._seconds(
            "request_time_per_output_token_seconds", "Of a request, after its first token.", _TOKEN_BUCKETS
        )
        self._whole = self._seconds("e2e_request_latency_seconds", "From arrival to the end.")
        self._queue = self._seconds("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = self._seconds(
            "request_prefill_time_seconds", "From the first step to the first token."
        )
        self._decode = self._seconds("request_decode_time_seconds", "From the first token to the end.")
        self._step = self._seconds("step_time_seconds", "Of a step.", _TOKEN_BUCKETS)
        self._iteration = self._histogram("iteration_tokens_total", "Tokens of a step.", _COUNT_BUCKETS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts of requests that ended.")
        self._generated = self._counter("generation_tokens", "Tokens of output of requests that ended.")
        ended = Counter(
            "pippin:request_success",
            "Requests that ended, by how: of finished_reason, stop and length are successes.",
            [*_LABELS, "finished_reason"],
            registry=self.registry,
        )
        self._ended = {r: ended.labels(**self._labels, finished_reason=r.value) for r in FinishReason}
        info = GaugeMetricFamily(
            "pippin:cache_config_info",
            "The cache.",
            labels=[*_LABELS, "block_size", "num_gpu_blocks", "cache_dtype"],
        )
        info.add_metric([model_name, str(page_size), str(num_pages), cache_dtype], 1)
        self._info = info

    def watch(self, load: Callable[[], Load]) -> None:
        """Tells an engine's load from now on, at the time of each look."""
        self.registry.register(_LoadCollector(load, self._labels["model_name"], self._info))

    def watch_adapters(self, adapters: Adapters) -> None:
        """Tells which adapters requests may use, at the time of each look: a gateway sends requests where theirs is."""
        self.registry.register(_AdapterCollector(adapters))

    def on_finish(self, request: Request, output: Output, timing: Timing) -> None:
        """See `Observer`."""
        assert output.finish_reason is not None, "the last output"
        self._ended[output.finish_reason].inc()
        self._prompt.inc(output.usage.prompt_tokens)
        self._generated.inc(output.usage.output_tokens)
        self._whole.observe(timing.finished - timing.arrived)
        if timing.scheduled is None:
            return
        self._queue.observe(timing.scheduled - timing.arrived)
        if timing.first_token is None:
            return
        self._prefill.observe(timing.first_token - timing.scheduled)
        decode_s = timing.finished - timing.first_token
        self._decode.observe(decode_s)
        if output.usage.output_tokens > 1:
            self._per_token.observe(decode_s / (output.usage.output_tokens - 1))

    def on_step(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """See `Observer`."""
        self._iteration.observe(num_tokens)
        self._step.observe(seconds)

    def on_tokens(self, seconds: Sequence[float]) -> None:
        """See `Observer`."""
        for gap in seconds:
            self._between.observe(gap)

    def on_first_token(self, request: Request, seconds: float) -> None:
        """See `Observer`."""
        self._first_token.observe(seconds)

    def _seconds(self, name: str, text: str, buckets: Sequence[float] = _REQUEST_BUCKETS) -> Histogram:
        return self._histogram(name, text, buckets)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"pippin:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"pippin:{name}", text, _LABELS, registry=self.registry).labels(**self._labels)


class _AdapterCollector(Collector):
    """Metrics of adapters, in vLLM's form: names in labels, and the time as value."""

    def __init__(self, adapters: Adapters):
        self._adapters = adapters

    def collect(self) -> Iterator[Metric]:
        labels = ["running_lora_adapters", "waiting_lora_adapters", "max_lora"]
        metric = GaugeMetricFamily(
            "pippin:lora_requests_info", "The adapters that are loaded.", labels=labels
        )
        names = ",".join(loaded.adapter.name for loaded in self._adapters.loaded())
        metric.add_metric([names, "", str(self._adapters.count)], time.time())
        yield metric


class _LoadCollector(Collector):
    """Metrics of an engine's load."""

    def __init__(self, load: Callable[[], Load], model_name: str, info: Metric):
        self._load, self._model_name, self._info = load, model_name, info

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        gauges = {
            "num_requests_running": ("Requests that steps are computed for.", load.num_running),
            "num_requests_waiting": ("Requests that wait.", load.num_waiting),
            "num_tokens_waiting": ("Tokens of requests that wait.", load.waiting_tokens),
            "kv_cache_usage_perc": ("Of the cache, 1 is all.", load.used_pages / load.num_pages),
        }
        counters = {
            "num_requests_taken": ("Requests that were taken: those that ended, run and wait.", load.taken),
            "num_preemptions": ("Requests that gave up their turn.", load.preemptions),
            "prefix_cache_queries": ("Tokens of prompts.", load.prefix_queries),
            "prefix_cache_hits": ("Tokens of prompts that were in the cache.", load.prefix_hits),
            "spec_decode_num_draft_tokens": ("Tokens that were guessed.", load.drafts),
            "spec_decode_num_accepted_tokens": ("Tokens that were guessed rightly.", load.right_drafts),
        }
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in metrics.items():
                metric = kind(f"pippin:{name}", text, labels=_LABELS)
                metric.add_metric([self._model_name], value)
                yield metric
        yield self._info
