"""A model that several devices share: the answers of one device, and its memory divided by the devices.

The test's target sets XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import override
from pippin.core.errors import ShardingError
from pippin.core.module import split
from pippin.layers.causal_lm_config import FloatType
from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025
from pippin.layers.models.llama import smollm2_135m
from pippin.serve.engine.engine import Engine
from pippin.serve.engine.request import Request, Sampling
from pippin.serve.engine.scheduler import Limits
from pippin.serve.engine.testing import serve_all
from pippin.serve.form import Form
from pippin.serve.placement import tensor_parallel, with_key_heads
from pippin.serve.runner import ModelRunner

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)

_GROUPED = override(
    smollm2_135m(),
    {
        "vocab_size": 256,
        "dim": 64,
        "decoder.num_layers": 2,
        "decoder.layer.attention.num_kv_heads": 2,
        "decoder.layer.attention.num_heads": 8,
        "decoder.layer.attention.head_dim": 16,
        "decoder.layer.feed_forward.hidden_dim": 96,
    },
)
# As many readers of one layer's keys as in AFM, and a vocabulary that no number of devices divides.
_SHARED = afm_on_device_2025(
    vocab_size=251,
    dim=32,
    num_heads=8,
    head_dim=8,
    num_layers=3,
    num_readers=2,
    num_kv_heads=4,
    hidden_dim=48,
).set(activation_dtype=FloatType.FLOAT32)
_LIMITS = Limits(num_pages=256, page_size=4, longest=96, max_requests=16, chunk_tokens=64, row_tokens=16)
# Log-probabilities of two orders of the same float32 sums, of logits of some units: about 20 times what was seen.
_TOLERANCE = 5e-5


@functools.cache
def _params(cfg):
    """Parameters of a model whose answers do not repeat one token, NumPy's."""
    _, params = split(cfg.build(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a + 0.3 * a.std() * rng.standard_normal(a.shape), np.float32), params
    )


@functools.cache
def _runner(cfg, ways, limits=_LIMITS, int8=False):
    placement = tensor_parallel(ways, cfg) if ways > 1 else None
    return ModelRunner(cfg, _params(cfg), limits, Form(placement, int8_weights=int8, int8_cache=int8))


def _request(i, *, length=None, max_tokens=10, **sampling):
    rng = np.random.default_rng(i)
    prompt = (*range(40, 40 + i % 3 * 7), *rng.integers(0, 250, 3 + 5 * i % 37).tolist())
    given = Sampling(**{"temperature": 0.0, "seed": i, "logprobs": 1, **sampling})
    return Request(request_id=str(i), prompt=prompt, max_tokens=max_tokens, sampling=given, text=False)


def _serve(cfg, ways, requests, limits=_LIMITS, int8=False):
    """What each request was told of its tokens; the engine's load at the end."""
    runner = _runner(cfg, ways, limits, int8)
    runner.reset()
    engine = Engine(runner, limits, lambda token: b"")
    return serve_all(engine, requests, timeout_s=300)


def _same(found, expected, tolerance=_TOLERANCE):
    assert {n: [s.token for s in told] for n, told in found.items()} == {
        n: [s.token for s in told] for n, told in expected.items()
    }
    for name, told in found.items():
        np.testing.assert_allclose(
            [s.logprob for s in told], [s.logprob for s in expected[name]], atol=tolerance, rtol=0
        )


@pytest.mark.parametrize(
    "cfg, ways",
    [(_GROUPED, 2), (_GROUPED, 4), (_GROUPED, 8), (_SHARED, 4), (_SHARED, 8)],
    ids=["2 of 2 key heads", "4 of 2", "8 of 2", "shared keys, 4 of 4", "shared keys, 8 of 4"],
)
def test_answers_are_those_of_one_device(cfg, ways):
    requests = [_request(i) for i in range(5)]
    _same(_serve(cfg, ways, requests), _serve(cfg, 1, requests))


def test_int8_weights_and_cache_are_shared_too():
    requests = [_request(i) for i in range(5)]
    # Where a number lies between two steps, the last bit of float32 decides which one it gets.
    _same(_serve(_GROUPED, 4, requests, int8=True), _serve(_GROUPED, 1, requests, int8=True), tolerance=0.02)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20}])
def test_an_answer_is_the_same_bit_by_bit_alone_and_among_others(sampling):
    requests = [_request(i, **sampling) for i in range(12)]
    together = _serve(_GROUPED, 4, requests)
    for request in requests[::4]:
        assert _serve(_GROUPED, 4, [request])[request.request_id] == together[request.request_id]


def test_answers_survive_pages_that_run_out_drafts_and_common_beginnings():
    scarce = Limits(num_pages=24, page_size=4, longest=96, max_requests=16, chunk_tokens=64)
    requests = [_request(i, max_tokens=20) for i in range(6)]
    _same(_serve(_GROUPED, 4, requests, scarce), _serve(_GROUPED, 1, requests))


def test_each_device_has_its_part_of_parameters_and_cache_and_no_more():
    runner = _runner(_GROUPED, 8)
    first = jax.devices()[0]

    def sizes(tree):
        arrays = jax.tree.leaves(tree)
        on_first = [s.data.nbytes for a in arrays for s in a.addressable_shards if s.device == first]
        return sum(on_first) / sum(a.nbytes for a in arrays)

    # All but norms.
    assert sizes(runner._params) < 1 / 8 + 0.01
    # One head each, of the eight that two were made.
    assert sizes([a for a in jax.tree.leaves(runner._cache) if a.ndim > 2]) == 1 / 8
    # And so it stays.
    _serve(_GROUPED, 8, [_request(0)])
    assert sizes([a for a in jax.tree.leaves(runner._cache) if a.ndim > 2]) == 1 / 8


def test_parameters_come_to_the_devices_in_parts(monkeypatch):
    seen = []
    put = jax.make_array_from_callback

    def watched(shape, sharding, callback):
        return put(
            shape, sharding, lambda index: seen.append((shape, callback(index).shape)) or callback(index)
        )

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    ModelRunner(_GROUPED, _params(_GROUPED), _LIMITS, Form(tensor_parallel(2, _GROUPED)))
    whole = {shape for shape, part in seen if shape == part}
    assert whole == {(64,)}  # norms


def test_a_number_of_devices_that_cannot_share_the_model_is_refused_with_those_that_can():
    with pytest.raises(
        ShardingError, match=r"3 devices .* 8 heads\. Set --tensor-parallel to 1, 2, 4 or 8\."
    ):
        tensor = tensor_parallel(3, _GROUPED)
        ModelRunner(_GROUPED, _params(_GROUPED), _LIMITS, Form(tensor))
    with pytest.raises(ShardingError, match=r"9 heads\. Set --tensor-parallel to 1 or 3\."):
        with_key_heads(smollm2_135m(), 2)
    with pytest.raises(ShardingError, match="JAX sees 8 devices"):
        tensor_parallel(16, _GROUPED)


def test_key_heads_that_are_fewer_than_devices_are_repeated():
    fitted = with_key_heads(_GROUPED, 8)
    assert fitted.decoder.layer.attention.num_kv_heads == 8
    assert with_key_heads(_GROUPED, 2) == _GROUPED
