"""The runner: the model's own greedy answers, whatever is served beside them, and in the same bits."""

import dataclasses
import functools
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.adapter import LowRank
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError
from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.layers import reference
from pippin.layers.causal_lm_config import FloatType
from pippin.layers.generate import generate
from pippin.layers.linear_multi_lora import adapter_shapes
from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025
from pippin.layers.models.llama import smollm2_135m
from pippin.layers.unrolled import unrolled
from pippin.serve.engine.draft_model import DraftModel
from pippin.serve.engine.engine import Engine
from pippin.serve.engine.request import Adapter, Request, Sampling
from pippin.serve.engine.scheduler import Limits, Row, Scheduler
from pippin.serve.engine.testing import serve_all
from pippin.serve.form import AdapterRoom, Form
from pippin.serve.runner import ModelRunner, page_bytes

_TINY = override(
    smollm2_135m(),
    {
        "vocab_size": 256,
        "dim": 32,
        "decoder.num_layers": 2,
        "decoder.layer.attention.num_kv_heads": 1,
        "decoder.layer.attention.num_heads": 2,
        "decoder.layer.attention.head_dim": 16,
        "decoder.layer.feed_forward.hidden_dim": 48,
    },
)
# Products of this size are where the order of sums depends on how many rows there are.
_WIDE = override(
    smollm2_135m(),
    {"vocab_size": 512, "decoder.num_layers": 1, "decoder.layer.feed_forward.hidden_dim": 1536},
)
_SHARED = afm_on_device_2025(
    vocab_size=256,
    dim=32,
    num_heads=4,
    head_dim=8,
    num_layers=3,
    num_readers=2,
    num_kv_heads=2,
    hidden_dim=48,
).set(activation_dtype=FloatType.FLOAT32)
_SMALLER = override(_TINY, {"decoder.num_layers": 1})
_FORM, _INT8 = Form(), Form(int8_weights=True, int8_cache=True)
_LIMITS = Limits(num_pages=256, page_size=4, longest=96, max_requests=32, chunk_tokens=128, row_tokens=16)


@functools.cache
def _model(cfg):
    """A model whose answers do not repeat one token."""
    definition, params = split(cfg.build(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + 0.3 * a.std() * rng.standard_normal(a.shape), jnp.float32), params
    )
    return merge(definition, params), params


@functools.cache
def _runner(cfg, limits=_LIMITS, form=_FORM):
    return ModelRunner(cfg, _model(cfg)[1], limits, form)


def _request(i, *, max_tokens=12, length=None, **sampling):
    """The i-th of many requests. Their prompts are of many lengths, and some begin alike."""
    rng = np.random.default_rng(i)
    prompt = (*range(40, 40 + i % 3 * 7), *rng.integers(0, 256, 3 + 5 * i % 37).tolist())
    if length is not None:
        prompt = (*prompt, *range(length))[:length]
    given = Sampling(**{"temperature": 0.0, "seed": i, **sampling})
    return Request(request_id=str(i), prompt=prompt, max_tokens=max_tokens, sampling=given, text=False)


def _serve(cfg, requests, limits=_LIMITS, form=_FORM, runner=None, draft=None):
    """The tokens of each request, which are served together."""
    runner = runner or _runner(cfg, limits, form)
    runner.reset()
    draft_model = None if draft is None else DraftModel(draft)
    engine = Engine(runner, limits, lambda token: b"", draft_model=draft_model)
    found = serve_all(engine, requests, timeout_s=200)
    load = engine.load()
    assert load.used_pages == 0
    assert draft is None or 0 < load.right_drafts
    # With the same weights and the same random numbers, a guess is wrong only by the last bits of logits.
    assert draft is None or draft.cfg is not cfg or load.right_drafts > 0.9 * load.drafts
    return found


def _ids(sampled):
    return [one.token for one in sampled]


@pytest.mark.parametrize("cfg", [_TINY, _SHARED], ids=["llama", "shared keys"])
def test_greedy_answers_are_those_of_generate(cfg):
    requests = [_request(i, length=21) for i in range(6)]
    served = _serve(cfg, requests)
    for request in requests:
        expected = generate(_model(cfg)[0], list(request.prompt), max_new_tokens=request.max_tokens)
        assert _ids(served[request.request_id]) == list(expected)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}]
)
def test_an_answer_is_the_same_alone_and_among_thirty(sampling):
    requests = [_request(i, logprobs=2, **sampling) for i in range(31)]
    together = _serve(_TINY, requests)
    for request in requests[::5]:
        alone = _serve(_TINY, [request])
        # Log-probabilities too: to the last bit.
        assert alone[request.request_id] == together[request.request_id]


@pytest.mark.parametrize("cfg", [_TINY, _SHARED], ids=["llama", "shared keys"])
def test_so_it_is_of_int8_weights_keys_and_values(cfg):
    requests = [_request(i, logprobs=2, temperature=0.5 * (i % 2)) for i in range(31)]
    together = _serve(cfg, requests, form=_INT8)
    for request in requests[::10]:
        alone = _serve(cfg, [request], form=_INT8)
        assert alone[request.request_id] == together[request.request_id]
    tight = Limits(num_pages=40, page_size=4, longest=96, max_requests=32)
    scarce = _serve(cfg, requests[:8], tight, _INT8)
    assert scarce == {name: told for name, told in together.items() if int(name) < 8}


def test_int8_says_nearly_what_floats_say():
    requests = [_request(i, logprobs=1, max_tokens=1) for i in range(31)]
    floats, numbers = (_serve(_TINY, requests, form=form) for form in (_FORM, _INT8))
    moved = [abs(floats[n][0].logprob - numbers[n][0].logprob) for n in floats]
    assert 0 < np.median(moved) < 0.05, moved
    assert sum(floats[n][0].token == numbers[n][0].token for n in floats) >= 28


def test_an_int8_cache_has_more_pages_of_the_same_memory():
    for cfg, head_dim in ((_TINY, 16), (_SHARED, 8)):
        # Of each head and token: its numbers, and a scale of four bytes.
        expected = (head_dim + 4) / (4 * head_dim)
        assert page_bytes(cfg, 16, int8=True) == expected * page_bytes(cfg, 16)
    runner = _runner(_TINY, _LIMITS, _INT8)
    held = sum(a.nbytes for a in jax.tree.leaves(runner._cache) if a.dtype != np.int32)
    assert held == _LIMITS.num_pages * page_bytes(_TINY, _LIMITS.page_size, int8=True)


def test_an_answer_is_the_same_when_pages_ran_out_and_it_was_computed_again():
    tight = Limits(num_pages=30, page_size=4, longest=96, max_requests=32)
    requests = [_request(i, max_tokens=20, temperature=1.0, logprobs=1) for i in range(8)]
    free, scarce = _serve(_TINY, requests), _serve(_TINY, requests, tight)
    assert free == scarce


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4, "frequency_penalty": 0.1}])
def test_drafts_change_no_answer(sampling):
    plain = Limits(**{**dataclasses.asdict(_LIMITS), "max_drafts": 0})
    requests = [_request(i, max_tokens=40, logprobs=1, **sampling) for i in range(3)]
    # A text that repeats itself: there is much to guess.
    requests = [dataclasses.replace(r, prompt=(*r.prompt[:8], *(7, 8, 9) * 4)) for r in requests]
    assert _serve(_TINY, requests) == _serve(_TINY, requests, plain)


def _maps(seed, rank):
    """An adapter for most of the linear maps of _TINY."""
    rng = np.random.default_rng(seed)
    shapes = adapter_shapes(_roomy()._params)
    return {
        path: LowRank(*(0.3 * rng.standard_normal(s, np.float32) for s in ((i, rank), (rank, o))))
        for path, (i, o) in shapes.items()
        if "up_proj" not in path
    }


@functools.cache
def _roomy():
    return ModelRunner(_TINY, _model(_TINY)[1], _LIMITS, Form(room=AdapterRoom(count=3, rank=4)))


def _with_adapters(requests):
    """The requests, of which every third has the first adapter, the next one the second, and the next none."""
    adapters = [Adapter("a", 1, 1), Adapter("b", 3, 2), None]
    return [dataclasses.replace(r, adapter=adapters[i % 3]) for i, r in enumerate(requests)]


def test_an_answer_with_an_adapter_is_that_of_the_merged_model_alone_and_among_thirty():
    runner = _roomy()
    maps = {1: _maps(1, 4), 3: _maps(2, 2)}
    for slot, of_slot in maps.items():
        runner.put_adapter(slot, of_slot)
    requests = _with_adapters([_request(i, logprobs=1) for i in range(31)])
    together = _serve(_TINY, requests, runner=runner)
    plain = _serve(_TINY, requests)
    for request in requests[:6]:
        assert _serve(_TINY, [request], runner=runner)[request.request_id] == together[request.request_id]
        tokens = _ids(together[request.request_id])
        if request.adapter is None:
            assert plain[request.request_id] == together[request.request_id]
        else:
            assert tokens != _ids(plain[request.request_id])
            merged = _merged(maps[request.adapter.slot])
            assert tokens == list(generate(merged, list(request.prompt), max_new_tokens=request.max_tokens))


def _merged(maps):
    """The model whose weights have the low-rank products within."""
    cfg, params = unrolled(_TINY, jax.tree.map(np.asarray, _model(_TINY)[1]))
    flat = flatten_params(params)
    for path, (down, up) in maps.items():
        flat[f"{path}.weight"] = flat[f"{path}.weight"] + down @ up
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    return merge(definition, jax.tree.map(jnp.asarray, unflatten_params(flat)))


def test_adapters_of_other_sizes_and_for_other_maps_are_refused():
    path = next(iter(adapter_shapes(_roomy()._params)))
    wrong = LowRank(np.zeros((31, 2), np.float32), np.zeros((2, 32), np.float32))
    with pytest.raises(CheckpointError, match=f"{path} of 31 inputs"):
        _roomy().put_adapter(1, {path: wrong})
    with pytest.raises(CheckpointError, match="no room for one"):
        _roomy().put_adapter(1, {"head": wrong})


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
@pytest.mark.parametrize("smaller", [_TINY, _SMALLER], ids=["the same", "another"])
def test_a_draft_model_changes_no_answer(sampling, smaller):
    draft = _Draft(smaller)
    requests = [_request(i, max_tokens=24, logprobs=1, **sampling) for i in range(5)]
    assert _serve(_TINY, requests, draft=draft) == _serve(_TINY, requests)


class _Draft(ModelRunner):
    """A runner that remembers its model."""

    def __init__(self, cfg):
        super().__init__(cfg, _model(cfg)[1], _LIMITS)
        self.cfg = cfg


def test_logits_of_wide_layers_have_the_same_bits_in_every_batch():
    runner, rng = _runner(_WIDE), np.random.default_rng(1)
    texts = [rng.integers(0, 512, 60).tolist() for _ in range(32)]
    pages = [list(range(16 * (i % 16), 16 * (i % 16) + 16)) for i in range(32)]

    def row(i, start, stop):
        return Row(str(i), texts[i][start:stop], start, pages[i], _GREEDY, texts[i][:stop], 48, None)

    def logprobs(rows):
        return {row.request_id: one for row, (one,) in zip(rows, runner.run(rows), strict=True)}

    alone = logprobs([row(0, 0, 48)])["0"], logprobs([row(0, 48, 49)])["0"]
    # A prompt in two parts, beside others, and its answer in batches of any size.
    logprobs([row(1, 0, 48), row(0, 0, 20), row(2, 0, 48)])
    among = logprobs([row(3, 0, 17), row(0, 20, 48)])["0"]
    assert among == alone[0]
    for count in (2, 7, 16):
        assert logprobs([row(i, 48, 49) for i in range(count)])["0"] == alone[1]


_GREEDY = Sampling(temperature=0.0, logprobs=20)


def _sums(requests, among=(), limits=_LIMITS):
    """What the engine gives for requests that want sums, served beside others."""
    runner = _runner(_TINY, limits)
    runner.reset()
    engine = Engine(runner, limits, lambda token: b"")
    outputs: queue.Queue = queue.Queue()
    for request in (*among, *requests):
        engine.submit(request, outputs.put)
    engine.start()
    found, missing = {}, len(among) + len(requests)
    while missing:
        output = outputs.get(timeout=200)
        if output.finish_reason is not None:
            found[output.request_id], missing = output.sums, missing - 1
    engine.stop(0)
    return [found[request.request_id] for request in requests]


def test_sums_are_those_of_the_models_hidden_states_and_the_same_in_every_batch():
    lengths = (1, 15, 16, 17, 90)
    asking = [
        dataclasses.replace(_request(i, length=n), request_id=f"e{i}", max_tokens=0, sums=True)
        for i, n in enumerate(lengths)
    ]
    tight = Limits(num_pages=30, page_size=4, longest=96, max_requests=32)
    others = [_request(100 + i, max_tokens=20, temperature=1.0) for i in range(6)]
    alone = [_sums([request])[0] for request in asking]
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), _model(_TINY)[1])
    for request, found in zip(asking, alone, strict=True):
        tokens = np.asarray([request.prompt])
        at = np.arange(tokens.shape[1])[None]
        hidden = reference.hidden_states(params, tokens, at, 2, head_dim=16, theta=100_000.0)
        np.testing.assert_allclose(found, hidden[0].sum(axis=0), rtol=1e-4, atol=1e-4)
    for limits in (_LIMITS, tight):  # pages run out, and prompts are computed again
        for one, two in zip(alone, _sums(asking, others, limits), strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_step_without_rows_that_ask_gives_no_tokens():
    row = Row("r", [1, 2, 3], 0, [0], None, [1, 2, 3, 4], 4, None)
    assert _runner(_TINY).run([row]) == [[]]


def test_a_row_whose_logits_are_not_finite_has_no_token_and_others_do():
    cfg = _TINY
    params = jax.tree.map(np.array, _model(cfg)[1])
    params["embedding"]["weight"][7] = np.nan
    runner = ModelRunner(cfg, params, _LIMITS)
    # As a column of the head it would spoil every row.
    runner._params["head"]["weight"] = jnp.asarray(np.array(_model(cfg)[1]["embedding"]["weight"]).T)
    greedy = Sampling(temperature=0.0)
    rows = [Row(n, [t], 0, [p], greedy, [t], 1, None) for n, t, p in (("bad", 7, 0), ("good", 8, 1))]
    (bad,), (good,) = runner.run(rows)
    assert bad.token == -1 and good.token >= 0


def test_the_scheduler_and_the_runner_agree_on_the_sizes():
    limits = Limits(num_pages=8, max_requests=5, chunk_tokens=160, row_tokens=32)
    shapes = [(s.rows, s.tokens) for s in ModelRunner(_TINY, _model(_TINY)[1], limits).shapes()]
    assert shapes == [(4, 1), (8, 1), (2, 32), (4, 32), (8, 32)]
    assert Scheduler(limits).limits.max_context == 128
