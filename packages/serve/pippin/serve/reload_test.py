"""A model whose files change while it is served."""

import functools
import gc
import queue
import shutil
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.adapter import LowRank, load_adapter, save_adapter
from pippin.core.bundle import save_bundle
from pippin.core.config_tree import override
from pippin.core.module import flatten_params, merge, parameter_infos, split, unflatten_params
from pippin.layers.adapter import model_signature
from pippin.layers.generate import generate
from pippin.layers.models.llama import smollm2_135m
from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import Request, Sampling
from pippin.serve.errors import PreconditionError
from pippin.serve.model import AdapterSource, Sizes, open_served
from pippin.serve.tokenizer_testing import save_tokenizer

_CFG = override(
    smollm2_135m(),
    {
        "vocab_size": 272,
        "dim": 16,
        "decoder.num_layers": 1,
        "decoder.layer.attention.num_kv_heads": 2,
        "decoder.layer.attention.num_heads": 2,
        "decoder.layer.attention.head_dim": 8,
        "decoder.layer.feed_forward.hidden_dim": 24,
    },
)
_PROMPT = (5, 6, 7, 8)
_FORMS = {
    "plain": {},
    "int8": {"int8_weights": True, "int8_cache": True},
    "room for adapters": {},
    "int8, room for adapters": {"int8_weights": True, "int8_cache": True},
    "two devices": {"tensor_parallel": 2},
    "two devices, int8": {"tensor_parallel": 2, "int8_weights": True, "int8_cache": True},
    "two devices, room for adapters": {"tensor_parallel": 2},
}


@functools.cache
def _params(seed):
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: _CFG.build(rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(seed)
    return unflatten_params({p: rng.normal(size=i.shape).astype(np.float32) for p, i in infos.items()})


def _expected(seed, max_tokens):
    definition, _ = split(nnx.eval_shape(lambda: _CFG.build(rngs=nnx.Rngs(0))))
    return list(generate(merge(definition, _params(seed)), list(_PROMPT), max_new_tokens=max_tokens))


def _save(path, seed=0, cfg=_CFG, params=None, **tokenizer):
    """A bundle in the place of another, if there is one."""
    shutil.rmtree(path, ignore_errors=True)
    folder = path.with_name("tokenizer")
    shutil.rmtree(folder, ignore_errors=True)
    save_bundle(path, cfg, params or _params(seed), tokenizer=save_tokenizer(folder, **tokenizer))


class _Served:
    """An engine, and its callers."""

    def __init__(self, path, form="plain"):
        sizes = Sizes(cache_bytes=1 << 20, max_requests=4, chunk_tokens=64, max_context=400, **_FORMS[form])
        adapters = None
        if "adapters" in form:
            path.with_name("adapters").mkdir(exist_ok=True)
            adapters = AdapterSource(path.with_name("adapters"), count=2, rank=2)
        self.backend = open_served(path, sizes, QueueLimits(), adapters=adapters)
        self.engine = self.backend.engine
        self.engine.start()

    def ask(self, request_id, max_tokens=8, adapter=None):
        outputs = queue.Queue()
        sampling = Sampling(temperature=0.0, logprobs=1)
        request = Request(
            request_id=request_id, prompt=_PROMPT, max_tokens=max_tokens, sampling=sampling, adapter=adapter
        )
        self.engine.submit(request, outputs.put)
        return outputs

    @staticmethod
    def answer(outputs):
        found = []
        while not found or found[-1].finish_reason is None:
            found.append(outputs.get(timeout=100))
        return [sampled for output in found for sampled in output.tokens]

    def reload(self):
        self.engine.exchange(self.backend.model.read_anew()).result(100)


@pytest.fixture
def served(tmp_path, request):
    _save(tmp_path / "apple")
    found = _Served(tmp_path / "apple")
    request.addfinalizer(lambda: found.engine.stop(0))
    return found


def _ids(tokens):
    return [one.token for one in tokens]


def _write_adapter(path, seed, base):
    """An adapter of the model of a seed, for all its linear maps."""
    rng = np.random.default_rng(seed)
    maps = {}
    for name, weight in flatten_params(_params(base)).items():
        if name.startswith("decoder.") and name.endswith(".weight"):
            *stack, inputs, outputs = weight.shape
            down, up = rng.normal(size=(*stack, inputs, 2)), rng.normal(size=(*stack, 2, outputs))
            maps[name.removesuffix(".weight")] = LowRank(down.astype(np.float32), up.astype(np.float32))
    save_adapter(path, maps, model_signature(_params(base)))


@pytest.mark.parametrize("form", _FORMS)
async def test_in_every_form_the_new_answers_are_those_of_a_server_of_the_new_weights(
    tmp_path, request, form
):
    if "two devices" in form and jax.device_count() < 2:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=2")
    path = tmp_path / "apple"
    _save(path)
    served = _Served(path, form)
    request.addfinalizer(lambda: served.engine.stop(0))
    before = served.answer(served.ask("before"))
    _save(path, seed=1)
    served.reload()
    fresh = _Served(path, form)
    request.addfinalizer(lambda: fresh.engine.stop(0))
    after = served.answer(served.ask("after"))
    assert after == fresh.answer(fresh.ask("after"))
    assert _ids(after) != _ids(before)
    if "int8" not in form:
        assert (_ids(before), _ids(after)) == (_expected(0, 8), _expected(1, 8))
    if "adapters" in form:
        answers = []
        _write_adapter(tmp_path / "adapters" / "old", 2, base=0)
        _write_adapter(tmp_path / "adapters" / "new", 2, base=1)
        for one in (served, fresh):
            with pytest.raises(PreconditionError, match="was made for the model"):
                await one.backend.model.adapters.load("old")
            loaded = await one.backend.model.adapters.load("new")
            answers.append(one.answer(one.ask("with", adapter=loaded.adapter)))
        assert answers[0] == answers[1] and _ids(answers[0]) != _ids(after)
        if "int8" not in form:
            assert _ids(answers[0]) == _with_adapter(tmp_path / "adapters" / "new", 1, 8)


def _with_adapter(path, seed, max_tokens):
    """The answer of the model whose weights have the low-rank products within."""
    flat = flatten_params(_params(seed))
    for name, pair in load_adapter(path).maps().items():
        flat[f"{name}.weight"] = flat[f"{name}.weight"] + pair.down @ pair.up
    definition, _ = split(nnx.eval_shape(lambda: _CFG.build(rngs=nnx.Rngs(0))))
    return list(generate(merge(definition, unflatten_params(flat)), list(_PROMPT), max_new_tokens=max_tokens))


def test_answers_are_the_new_models_to_the_last_bit_and_one_in_flight_keeps_the_old(served, tmp_path):
    assert _ids(served.answer(served.ask("before"))) == _expected(0, 8)
    flying = served.ask("flying", 200)
    flying.get(timeout=100)
    old = weakref.ref(jax.tree.leaves(served.engine._runner._params)[0])
    _save(tmp_path / "apple", seed=1)
    served.reload()
    rest = _ids(served.answer(flying))
    assert rest[-8:] == _expected(0, 200)[-8:]
    after = served.answer(served.ask("after"))
    gc.collect()
    assert old() is None, "the old weights are in memory still"
    fresh = _Served(tmp_path / "apple")
    assert after == fresh.answer(fresh.ask("r"))
    fresh.engine.stop(0)
    assert _ids(after) == _expected(1, 8)


def _not_finite(path):
    params = jax.tree.map(np.array, _params(1))
    params["norm"]["scale"][0] = np.nan
    _save(path, params=params)


def _damaged(path):
    _save(path, seed=1)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def _another(path):
    cfg = override(_CFG, {"decoder.layer.feed_forward.hidden_dim": 32})
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))))
    params = unflatten_params({p: np.zeros(i.shape, np.float32) for p, i in infos.items()})
    _save(path, cfg=cfg, params=params)


def _other_tokenizer(path):
    _save(path, seed=1, add_bos_token=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_not_finite, "norm.scale is not finite"),
        (_damaged, "apple.*model.safetensors"),
        (_another, "another model than is served: .*hidden_dim: 24 -> 32"),
        (_other_tokenizer, "another model than is served: tokenizer: tokenizer_config.json"),
        (shutil.rmtree, "cannot be served"),
    ],
)
def test_what_cannot_be_served_changes_nothing(served, tmp_path, change, said):
    change(tmp_path / "apple")
    with pytest.raises(PreconditionError, match=said) as error:
        served.backend.model.read_anew()
    assert str(tmp_path) not in str(error.value)
    assert _ids(served.answer(served.ask("after"))) == _expected(0, 8)


def test_weights_of_other_shapes_are_refused_by_name(served):
    params = jax.tree.map(np.asarray, _params(1))
    with pytest.raises(PreconditionError, match=r"norm.scale is float32\[7\], and float32\[16\] is served"):
        served.engine._runner.prepare({**params, "norm": {"scale": np.zeros(7, np.float32)}})
    assert _ids(served.answer(served.ask("after"))) == _expected(0, 8)
