import asyncio
import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pippin.serve.testing import SlowRunner, fake_backend, serving
from pippin.v1 import inference_pb2 as pb

# What a gateway routes by, and what dashboards show.
NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "cache_config_info",
}


async def scrape(served) -> dict[str, float]:
    """name{a label's value} -> value, without the model's name."""

    def read():
        with urllib.request.urlopen(f"http://{served.server.metrics.address}/metrics", timeout=5) as page:
            return page.read().decode()

    families = list(text_string_to_metric_families(await asyncio.to_thread(read)))
    found = {}
    for family in families:
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "letters"
            found[sample.name.removeprefix("pippin:") + "".join(f"{{{v}}}" for v in labels.values())] = (
                sample.value
            )
    assert {family.name.removeprefix("pippin:") for family in families} >= NAMES
    return found


async def test_what_was_done_is_counted():
    async with serving(metrics_port=0) as served:
        for _ in range(3):
            await served.generate("hello" * 8, max_tokens=5)
        found = await scrape(served)
    assert found["request_success_total{length}"] == 3
    assert found["prompt_tokens_total"] == 120 and found["generation_tokens_total"] == 15
    assert found["time_to_first_token_seconds_count"] == 3
    assert found["inter_token_latency_seconds_count"] == 12
    assert found["e2e_request_latency_seconds_count"] == found["request_queue_time_seconds_count"] == 3
    assert found["prefix_cache_hits_total"] > 0
    assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0
    assert found["cache_config_info{16}{float32}{64}"] == 1


async def test_every_request_that_is_taken_ends_once_in_the_metrics():
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.005))
    fake.runner.broken.add("/bad/0")
    async with serving(fake, metrics_port=0) as served:
        await served.generate(max_tokens=2)
        with pytest.raises(grpc.aio.AioRpcError):
            await served.generate(request_id="bad")
        call = served.method("Generate")(pb.GenerateRequest(text="a", max_tokens=400))
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            while served.engine.load().num_running:
                await asyncio.sleep(0.01)
        found = await scrape(served)
    assert found["num_requests_taken_total"] == 3
    ended = {
        name: value for name, value in found.items() if name.startswith("request_success_total") and value
    }
    assert ended == {
        "request_success_total{length}": 1,
        "request_success_total{failed}": 1,
        "request_success_total{cancelled}": 1,
    }
