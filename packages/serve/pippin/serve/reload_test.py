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

from pippin.core.bundle import save_bundle
from pippin.core.config_tree import override
from pippin.core.module import flatten_params, merge, parameter_infos, split, unflatten_params
from pippin.layers.generate import generate
from pippin.layers.models.llama import smollm2_135m
from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import Request, Sampling
from pippin.serve.errors import PreconditionError
from pippin.serve.model import Sizes, open_served
from pippin.serve.tokenizer_testing import save_tokenizer

_CFG = override(
    smollm2_135m(),
    {
        "vocab_size": 272,
        "dim": 16,
        "decoder.num_layers": 1,
        "decoder.layer.attention.num_kv_heads": 1,
        "decoder.layer.attention.num_heads": 2,
        "decoder.layer.attention.head_dim": 8,
        "decoder.layer.feed_forward.hidden_dim": 24,
    },
)
_PROMPT = (5, 6, 7, 8)


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

    def __init__(self, path):
        sizes = Sizes(cache_bytes=1 << 20, max_requests=4, chunk_tokens=64, max_context=400)
        self.backend = open_served(path, sizes, QueueLimits())
        self.engine = self.backend.engine
        self.engine.start()

    def ask(self, request_id, max_tokens=8):
        outputs = queue.Queue()
        sampling = Sampling(temperature=0.0, logprobs=1)
        request = Request(request_id=request_id, prompt=_PROMPT, max_tokens=max_tokens, sampling=sampling)
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
