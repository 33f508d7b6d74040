import json
import shutil
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError, PippinError
from pippin.core.module import Params, flatten_params, parameter_infos, unflatten_params
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.huggingface import load_huggingface, save_huggingface
from pippin.layers.models.llama import llama, with_qk_norm
from pippin.layers.position_config import Llama3ScalingConfig, RoPEConfig

_SIZES = {
    "vocab_size": 32,
    "dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 24,
}
_BIASES = {
    **{f"decoder.layer.attention.{p}_proj.bias": True for p in "qkvo"},
    **{f"decoder.layer.feed_forward.{p}_proj.bias": True for p in ("gate", "up", "down")},
}
_SCALING = Llama3ScalingConfig(original_context=16)
CONFIGS = {
    "tied": llama(**_SIZES, tied=True, position=RoPEConfig(theta=100_000.0)),
    "untied, scaled": llama(**_SIZES, tied=False, position=RoPEConfig(scaling=_SCALING)),
    "biases": override(llama(**_SIZES, tied=False, position=RoPEConfig()), _BIASES),
    "normed": with_qk_norm(llama(**_SIZES, tied=True, position=RoPEConfig(), norm_eps=1e-6)),
}


def _random_params(cfg: CausalLMConfig, dtype: Any = np.float32) -> Params:
    """Parameters that are all different from each other."""
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(0)
    return unflatten_params({p: rng.normal(size=i.shape).astype(dtype) for p, i in infos.items()})


def _assert_same(a, b):
    a, b = flatten_params(a), flatten_params(b)
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


@pytest.fixture
def saved(tmp_path):
    """The folder of a tied model."""
    save_huggingface(tmp_path / "model", CONFIGS["tied"], _random_params(CONFIGS["tied"]))
    return tmp_path / "model"


@pytest.mark.parametrize("max_file_bytes", [1 << 30, 2000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, name, dtype, max_file_bytes):
    params = _random_params(CONFIGS[name], dtype)
    save_huggingface(tmp_path / "model", CONFIGS[name], params, max_file_bytes=max_file_bytes)
    loaded = load_huggingface(tmp_path / "model")
    assert (loaded.config, loaded.tokenizer) == (CONFIGS[name], None)
    _assert_same(loaded.params, params)


def test_jax_arrays_are_saved_as_numpys(tmp_path):
    params = _random_params(CONFIGS["normed"], ml_dtypes.bfloat16)
    on_device = unflatten_params({p: jnp.asarray(v) for p, v in flatten_params(params).items()})
    save_huggingface(tmp_path / "model", CONFIGS["normed"], on_device)
    _assert_same(load_huggingface(tmp_path / "model").params, params)


def test_names_and_shapes_are_theirs(tmp_path):
    params = _random_params(CONFIGS["biases"])
    save_huggingface(tmp_path / "model", CONFIGS["biases"], params)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (32, 16)
    assert tensors["model.embed_tokens.weight"].shape == (32, 16)
    layer = params["decoder"]["layer"]
    np.testing.assert_array_equal(
        tensors["model.layers.2.mlp.down_proj.weight"], layer["feed_forward"]["down_proj"]["weight"][2].T
    )
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.k_proj.bias"], layer["attention"]["k_proj"]["bias"][1]
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.post_attention_layernorm.weight"], layer["feed_forward_norm"]["scale"][0]
    )
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "float32"


def test_the_tokenizer_goes_along_with_its_facts(tmp_path, saved):
    (saved / "tokenizer.json").write_text('{"version": "1.0"}')
    raw = json.loads((saved / "config.json").read_text())
    facts = {"eos_token_id": [7, 9], "max_position_embeddings": 64}
    (saved / "config.json").write_text(json.dumps(raw | facts))
    loaded = load_huggingface(saved)
    assert loaded.tokenizer == saved
    save_huggingface(tmp_path / "again", loaded.config, loaded.params, loaded.tokenizer)
    assert (tmp_path / "again/tokenizer.json").read_text() == '{"version": "1.0"}'
    assert json.loads((tmp_path / "again/config.json").read_text()) == raw | facts
    save_huggingface(
        tmp_path / "longer", loaded.config, loaded.params, loaded.tokenizer, max_position_embeddings=128
    )
    assert json.loads((tmp_path / "longer/config.json").read_text())["max_position_embeddings"] == 128


def _rewrite(folder, change):
    """Changes a folder's tensors."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj.weight is missing"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.zeros(1)[:0].astype("f")}),
            "model.layers.3.mlp.up_proj.weight is not of this model",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(8, "f")}),
            "q_norm.weight is not of this model",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((16, 24), "f")}),
            r"up_proj.weight is \[16, 24\], not \[24, 16\].*Take both from one model",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((24, 16), "e")}),
            "up_proj.weight is float16, not float32 as in other layers",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "says tie_word_embeddings, but lm_head.weight differs.*Set tie_word_embeddings to false",
        ),
        (lambda t: [t.pop(name) for name in [*t] if ".0." in name], "; and 4 more"),
    ],
)
def test_tensors_of_another_model_are_named(saved, change, problem):
    _rewrite(saved, change)
    with pytest.raises(CheckpointError, match=problem):
        load_huggingface(saved)


def test_copies_of_what_is_known_are_no_extra_tensors(saved):
    before = load_huggingface(saved).params

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, "f")

    _rewrite(saved, add)
    _assert_same(load_huggingface(saved).params, before)


def _rewrite_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def test_sizes_that_a_file_claims_are_not_believed(saved):
    _rewrite_config(saved, num_hidden_layers=1 << 24, intermediate_size=1 << 24, vocab_size=1 << 24)
    with pytest.raises(CheckpointError, match=r"model.layers.3.*is missing"):
        load_huggingface(saved)


def test_an_untied_model_without_a_head_is_refused(saved):
    _rewrite_config(saved, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="lm_head.weight is missing"):
        load_huggingface(saved)


def test_an_odd_head_is_refused(saved):
    _rewrite_config(saved, head_dim=7)
    with pytest.raises(ConfigError, match=r"head_dim \(7\) must be even"):
        load_huggingface(saved)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda flat: flat.pop("norm.scale"), "norm.scale is missing from the parameters"),
        (lambda flat: flat.update({"head.weight": np.zeros(1)}), "head.weight is no parameter of the model"),
        (
            lambda flat: flat.update({"norm.scale": np.zeros(3, "f")}),
            r"norm.scale is float32\[3\]; it must be \[16\]",
        ),
        (lambda flat: flat.update({"norm.scale": np.zeros(16, "d")}), "norm.scale is float64.*or bfloat16"),
    ],
)
def test_parameters_of_another_tree_are_not_saved(tmp_path, change, problem):
    flat = flatten_params(_random_params(CONFIGS["tied"]))
    change(flat)
    with pytest.raises(CheckpointError, match=problem):
        save_huggingface(tmp_path / "model", CONFIGS["tied"], unflatten_params(flat))
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_bytes_load_or_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes") / "model"
    save_huggingface(
        folder, CONFIGS["tied"], _random_params(CONFIGS["tied"], np.float16), max_file_bytes=2500
    )
    file = data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    content = bytearray((folder / file).read_bytes())
    for at in data.draw(st.lists(st.integers(0, min(len(content), 2000) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    (folder / file).write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        load_huggingface(folder)
    except PippinError:
        pass
    shutil.rmtree(folder)
