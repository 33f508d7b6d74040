"""Models from their directories to answers, and what is said of those that cannot be served."""

import functools
import json
import os
import queue

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pippin.core.adapter import save_adapter
from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.module import flatten_params, merge, parameter_infos, split, unflatten_params
from pippin.layers.adapter import adapter_of
from pippin.layers.causal_lm_config import FloatType
from pippin.layers.generate import generate
from pippin.layers.huggingface import save_huggingface
from pippin.layers.kernel_config import BlockwiseKernelConfig, ReferenceKernelConfig, SplashKernelConfig
from pippin.layers.linear_config import LinearConfig, lora
from pippin.layers.models.llama import smollm2_135m
from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import Request, Sampling
from pippin.serve.errors import PreconditionError
from pippin.serve.model import AdapterSource, Sizes, find, open_served
from pippin.serve.served_model import Message, Regex
from pippin.serve.tokenizer_testing import TEMPLATE, make_tokenizer, save_tokenizer

_SIZES = Sizes(cache_bytes=1 << 20, max_requests=4, chunk_tokens=64)
_CFG = override(
    smollm2_135m(),
    {
        "vocab_size": 272,
        "dim": 16,
        "decoder.num_layers": 2,
        "decoder.layer.attention.num_kv_heads": 1,
        "decoder.layer.attention.num_heads": 2,
        "decoder.layer.attention.head_dim": 8,
        "decoder.layer.feed_forward.hidden_dim": 24,
    },
)


@functools.cache
def _params(dtype=np.float32):
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: _CFG.build(rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(0)
    return unflatten_params({p: rng.normal(size=i.shape).astype(dtype) for p, i in infos.items()})


def _open(path, sizes=_SIZES):
    return open_served(path, sizes, QueueLimits())


def _answer(backend, prompt, *, max_tokens=8, **kwargs):
    """The greedy answer's text and ids."""
    outputs = queue.Queue()
    request = Request(
        request_id="r",
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0.0),
        **kwargs,
    )
    backend.engine.start()
    backend.engine.submit(request, outputs.put)
    found = []
    while not found or found[-1].finish_reason is None:
        found.append(outputs.get(timeout=100))
    backend.engine.stop(0)
    return "".join(o.text for o in found), [s.token for o in found for s in o.tokens]


@functools.cache
def _expected(prompt, max_tokens=8):
    definition, _ = split(nnx.eval_shape(lambda: _CFG.build(rngs=nnx.Rngs(0))))
    return list(generate(merge(definition, _params()), list(prompt), max_new_tokens=max_tokens))


@pytest.fixture
def bundle(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", chat_template=TEMPLATE, add_bos_token=False)
    return save_bundle(tmp_path / "apple", _CFG, _params(), tokenizer=tokenizer)


def test_a_bundle_answers_in_text(bundle, caplog):
    with caplog.at_level("INFO"):
        backend = _open(bundle)
    prompt = backend.model.encode("true é")
    assert prompt == make_tokenizer().encode("true é")
    text, ids = _answer(backend, prompt)
    assert ids == _expected(tuple(prompt))
    assert text == make_tokenizer().decode(ids).rstrip("\ufffd")
    assert (backend.model.name, backend.model.vocab_size) == ("apple", 272)
    assert backend.model.stop_ids == make_tokenizer().eos_ids
    assert "programs for 4 rows of 16 tokens" in caplog.text  # where the start's time went


def test_a_conversation_is_encoded_by_the_models_template(bundle):
    backend = _open(bundle)
    special = make_tokenizer().special_tokens
    ids = backend.model.encode_chat([Message("user", "<|im_end|>")])
    assert (ids.count(special["<|im_start|>"]), ids.count(special["<|im_end|>"])) == (2, 1)
    constraint = backend.model.compile_constraint(Regex("[0-9]{3}"))
    text, _ = _answer(backend, ids, constraint=constraint)
    assert len(text) == 3 and text.isdecimal()


def test_a_hugging_face_folder_tells_its_context_and_is_computed_in_float32(tmp_path):
    tokenizer, half = save_tokenizer(tmp_path / "tokenizer"), _params(ml_dtypes.bfloat16)
    save_huggingface(tmp_path / "hf", _CFG, half, tokenizer, max_position_embeddings=40)
    backend = _open(tmp_path / "hf")
    assert (backend.model.context_length, backend.engine.limits.max_context) == (40, 40)
    assert backend.model.encode_chat is None
    assert len(_answer(backend, [1, 2, 3])[1]) == 8
    assert _open(tmp_path / "hf", Sizes(cache_bytes=1 << 20, max_context=24)).model.context_length == 24


def test_activations_of_bfloat16_are_float32_on_a_cpu(tmp_path):
    cfg = _CFG.set(activation_dtype=FloatType.BFLOAT16)
    backend = _open(save_bundle(tmp_path / "half", cfg, _params()))
    assert _answer(backend, [5, 6, 7], text=False)[1] == _expected((5, 6, 7))


def test_an_int8_model_has_four_times_the_tokens_in_a_cache_and_says_what_it_is_made_of(tmp_path):
    path = save_bundle(tmp_path / "model", _CFG, _params())
    small = {"cache_bytes": 64 << 10, "max_context": 1 << 20}
    floats, numbers = (
        _open(path, Sizes(**small, int8_weights=int8, int8_cache=int8)) for int8 in (False, True)
    )
    assert (floats.model.weights_dtype, floats.model.cache_dtype) == ("float32", "float32")
    assert (numbers.model.weights_dtype, numbers.model.cache_dtype) == ("int8", "int8")
    attention = _CFG.decoder.layer.attention
    expected = 4 * attention.head_dim / (attention.head_dim + 4)
    got = numbers.engine.limits.num_pages / floats.engine.limits.num_pages
    assert got == pytest.approx(expected, rel=0.1)
    assert len(_answer(numbers, [5, 6, 7], text=False)[1]) == 8


@pytest.mark.parametrize("kernel", [BlockwiseKernelConfig(), SplashKernelConfig(), ReferenceKernelConfig()])
def test_a_model_with_the_kernels_of_another_machine_is_served(tmp_path, kernel):
    cfg = override(_CFG, {"decoder.layer.attention.kernel": kernel})
    backend = _open(save_bundle(tmp_path / "trained", cfg, _params()))
    assert _answer(backend, [5, 6, 7], text=False)[1] == _expected((5, 6, 7))


def test_a_model_without_a_tokenizer_takes_and_gives_ids(tmp_path):
    backend = _open(save_bundle(tmp_path / "bare", _CFG, _params()))
    assert backend.model.encode is None and backend.model.compile_constraint is None
    assert _answer(backend, [5, 6, 7]) == ("", _expected((5, 6, 7)))


def test_a_draft_model_guesses_and_has_to_have_the_same_tokens(tmp_path, bundle):
    model = open_served(bundle, _SIZES, QueueLimits(), draft=bundle)
    prompt = model.model.encode("true é")
    assert _answer(model, prompt)[1] == _expected(tuple(prompt))
    load = model.engine.load()
    assert load.right_drafts == load.drafts > 0
    other = save_bundle(tmp_path / "other", _CFG, _params())
    with pytest.raises(CheckpointError, match="other tokens .* the same tokenizer and vocab_size"):
        open_served(bundle, _SIZES, QueueLimits(), draft=other)


async def test_an_adapter_fits_the_model_that_it_was_trained_on_and_no_other(tmp_path):
    tuned = lora(rank=2)(_CFG)
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: tuned.build(rngs=nnx.Rngs(0)))))
    rng, base = np.random.default_rng(5), flatten_params(_params())
    params = {
        path: base[name] if (name := path.replace(".base.", ".")) in base else rng.normal(size=i.shape)
        for path, i in infos.items()
    }
    params = unflatten_params({path: values.astype(np.float32) for path, values in params.items()})
    maps, signature = adapter_of(load_bundle(save_bundle(tmp_path / "tuned", tuned, params)))
    (tmp_path / "adapters").mkdir()
    save_adapter(tmp_path / "adapters" / "good", maps, signature)
    save_adapter(tmp_path / "adapters" / "other", maps, signature[::-1])
    bundle = save_bundle(tmp_path / "base", _CFG, _params())
    source = AdapterSource(tmp_path / "adapters", count=2, rank=2)
    model = open_served(bundle, _SIZES, QueueLimits(), adapters=source)
    assert model.model.adapters is not None
    with pytest.raises(PreconditionError, match="other was made for the model .* Train it on this model"):
        await model.model.adapters.load("other")
    good = await model.model.adapters.load("good")
    definition, _ = split(nnx.eval_shape(lambda: tuned.build(rngs=nnx.Rngs(0))))
    expected = generate(merge(definition, params), [5, 6, 7], max_new_tokens=8)
    assert _answer(model, [5, 6, 7], adapter=good.adapter)[1] == list(expected) != _expected((5, 6, 7))
    narrow = AdapterSource(tmp_path / "adapters", count=2, rank=1)
    model = open_served(bundle, _SIZES, QueueLimits(), adapters=narrow)
    with pytest.raises(PreconditionError, match="has rank 2, and there is room for 1.* --max-adapter-rank 2"):
        await model.model.adapters.load("good")


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    small = save_bundle(
        tmp_path / "small",
        _CFG.set(vocab_size=250),
        {**_params(), "embedding": {"weight": _params()["embedding"]["weight"][:250]}},
        tokenizer=save_tokenizer(tmp_path / "tokenizer"),
    )
    with pytest.raises(CheckpointError, match="has 264 tokens and the model 250"):
        _open(small)


def test_a_cache_that_holds_too_little_is_refused(bundle):
    with pytest.raises(
        ConfigError, match=r"0 MiB holds 32 tokens .* at least 64 .* --cache-mib to 1 or more"
    ):
        _open(bundle, Sizes(cache_bytes=4096, max_requests=4, chunk_tokens=64))


def test_what_is_no_language_model_is_refused(tmp_path):
    cfg = LinearConfig(input_dim=2, output_dim=2)
    path = save_bundle(tmp_path / "linear", cfg, {"weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match="holds a LinearConfig, which is no language model"):
        _open(path)


def test_the_newest_run_of_the_default_recipe_is_found(tmp_path):
    for age, name in enumerate(("stdlib_tiny", "stdlib_tiny_2", "other")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "trainer.textproto").touch()
        os.utime(run, (1000 + age, 1000 + age))
    assert find(None, tmp_path).name == "stdlib_tiny_2"


def test_without_a_run_the_error_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="no model to serve.*bazel run //packages/train:launch"):
        find(None, tmp_path)


def test_a_context_that_is_no_number_is_not_believed(bundle):
    (bundle / "tokenizer" / "config.json").write_text(json.dumps({"max_position_embeddings": "many"}))
    assert _open(bundle).model.context_length == 2048
