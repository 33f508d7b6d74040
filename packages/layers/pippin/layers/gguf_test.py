import functools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError, PippinError
from pippin.core.gguf_testing import write_gguf
from pippin.core.module import Params, flatten_params, parameter_infos, unflatten_params
from pippin.core.tokenizer import load_tokenizer
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.gguf import find_gguf, load_gguf
from pippin.layers.huggingface import save_huggingface
from pippin.layers.model_files import open_model
from pippin.layers.models.llama import llama, with_qk_norm
from pippin.layers.position_config import Llama3ScalingConfig, RoPEConfig

_SIZES = {
    "vocab_size": 6,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "hidden_dim": 64,
}
_BIASES = {
    **{f"decoder.layer.attention.{p}_proj.bias": True for p in "qkvo"},
    **{f"decoder.layer.feed_forward.{p}_proj.bias": True for p in ("gate", "up", "down")},
}
_SCALING = Llama3ScalingConfig(factor=32.0, original_context=8192)
_CONFIGS = {
    "tied": llama(**_SIZES, tied=True, position=RoPEConfig(theta=100_000.0)),
    "untied": llama(**_SIZES, tied=False, position=RoPEConfig(theta=10_000.0), norm_eps=1e-6),
    "scaled": llama(**_SIZES, tied=True, position=RoPEConfig(theta=500_000.0, scaling=_SCALING)),
    "biases": override(llama(**_SIZES, tied=False, position=RoPEConfig()), _BIASES),
    "normed": with_qk_norm(llama(**_SIZES, tied=True, position=RoPEConfig(), norm_eps=1e-6)),
}
_METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 8192,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 100_000.0,
    "llama.vocab_size": 6,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "\u2581"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
# Our last steps but one -> the names that llama.cpp's conversion gives to tensors.
_NAMES = {
    "attention_norm": "attn_norm",
    "feed_forward_norm": "ffn_norm",
    **{f"attention.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{f"attention.{n}_proj": f"attn_{n}" for n in "qkv"},
    "attention.o_proj": "attn_output",
    **{f"feed_forward.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
}
_TOP = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}


def _metadata(name: str) -> dict[str, Any]:
    cfg = _CONFIGS[name]
    arch = "qwen3" if name == "normed" else "llama"
    metadata = {key.replace("llama.", f"{arch}.", 1): value for key, value in _METADATA.items()}
    theta = cfg.decoder.layer.attention.position.theta
    metadata |= {"general.architecture": arch, f"{arch}.rope.freq_base": theta}
    return metadata | {f"{arch}.attention.layer_norm_rms_epsilon": cfg.norm.eps}


@functools.cache
def _random_params(name: str) -> Params:
    model = nnx.eval_shape(lambda: _CONFIGS[name].build(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    infos = flatten_params(parameter_infos(model))
    return unflatten_params({p: rng.normal(size=i.shape).astype(np.float32) for p, i in infos.items()})


def _permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as llama.cpp's conversion orders those of a Llama's queries and keys."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a model as llama.cpp has them."""
    tensors = {}
    for path, values in flatten_params(_random_params(name)).items():
        above, _, last = path.rpartition(".")
        suffix = "bias" if last == "bias" else "weight"
        if above in _TOP:
            tensors[f"{_TOP[above]}.{suffix}"] = values.T if above == "head" else values
            continue
        theirs = _NAMES[above.removeprefix("decoder.layer.")]
        for i, layer in enumerate(values):
            layer = layer.T if layer.ndim == 2 else layer
            if theirs in ("attn_q", "attn_k") and name != "normed":
                layer = _permuted(layer, 4 if theirs == "attn_q" else 2)
            tensors[f"blk.{i}.{theirs}.{suffix}"] = np.ascontiguousarray(layer)
    if name == "scaled":
        tensors["rope_freqs.weight"] = _LLAMA3_2_FACTORS
    return tensors


# What a wave of each pair of dims is divided by, from 8,192 tokens, theta 500,000 and a head of 16: those of more than
# 8,192 tokens by 32, of fewer than 2,048 by nothing, and between them by what is computed here.
_WAVES = 2 * np.pi * 500_000.0 ** (np.arange(0, 16, 2) / 16)
_BETWEEN = 1 / ((1 - (8192 / _WAVES - 1) / 3) / 32 + (8192 / _WAVES - 1) / 3)
_LLAMA3_2_FACTORS = np.where(_WAVES > 8192, 32, np.where(_WAVES < 2048, 1, _BETWEEN)).astype(np.float32)


def _write(path: Path, name: str = "tied", **change: Any) -> Path:
    metadata = _metadata(name) | {key.replace("__", "."): value for key, value in change.items()}
    return write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, _tensors(name))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_model_comes_back(name: str, tmp_path: Path) -> None:
    model = load_gguf(_write(tmp_path / "model.gguf", name))
    cfg: CausalLMConfig = model.config
    assert cfg == _CONFIGS[name]
    expected, got = flatten_params(_random_params(name)), flatten_params(model.params)
    assert expected.keys() == got.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(got[path], values, err_msg=path)
        assert got[path].dtype == np.float32


def test_quantised_tensors_are_close(tmp_path: Path) -> None:
    tensors = _tensors("tied")
    types = {name: "Q8_0" for name, values in tensors.items() if values.ndim == 2}
    model = load_gguf(write_gguf(tmp_path / "model.gguf", _metadata("tied"), tensors, types))
    expected = flatten_params(_random_params("tied"))
    for path, values in flatten_params(model.params).items():
        np.testing.assert_allclose(values, expected[path], atol=0.05, err_msg=path)


def test_the_tokenizer_is_in_the_cache(tmp_path: Path, cache: Path) -> None:
    model = load_gguf(_write(tmp_path / "model.gguf"))
    assert model.tokenizer is not None and model.tokenizer.is_relative_to(cache)
    assert load_tokenizer(model.tokenizer).eos_id == 2
    elsewhere = load_gguf(tmp_path / "model.gguf", cache_dir=tmp_path / "other").tokenizer
    assert elsewhere is not None and elsewhere.is_relative_to(tmp_path / "other")


def test_it_opens_as_other_models_do(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = _write(tmp_path / "folder" / "model.gguf")
    for path in (file, file.parent):
        bundle = open_model(path)
        assert bundle.component == _CONFIGS["tied"]
        assert bundle.tokenizer is not None
        assert bundle.params()["embedding"]["weight"].shape == (6, 32)
        assert bundle.provenance.source == str(path)


def test_a_folder_of_another_form_is_that(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as many a folder of GGUF files has
    assert open_model(tmp_path).component == _CONFIGS["tied"]
    save_huggingface(tmp_path / "other", _CONFIGS["untied"], _random_params("untied"))
    for file in (tmp_path / "other").iterdir():
        file.rename(tmp_path / file.name)
    assert open_model(tmp_path).component == _CONFIGS["untied"]


def test_a_folder_with_several_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds 0 .gguf files; one is expected"):
        find_gguf(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds 2 .gguf files \(a.gguf, b.gguf\); .* Give the file"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"general__architecture": "gemma"}, ConfigError, "general.architecture is 'gemma', which is not supported"),
        ({"general__architecture": None}, CheckpointError, "its metadata has no general.architecture"),
        ({"llama__block_count": None}, CheckpointError, "its metadata has no llama.block_count"),
        ({"llama__block_count": "2"}, CheckpointError, "llama.block_count is '2'; it must be one integer"),
        ({"llama__block_count": 0}, ConfigError, "num_hidden_layers is 0"),
        ({"llama__block_count": 3}, CheckpointError, r"its metadata describes: blk.2.attn_norm.weight is missing|missing"),
        ({"llama__block_count": 1}, CheckpointError, r"blk.1.* is not of this model.* Take both from one model"),
        ({"llama__block_count": 1 << 24}, CheckpointError, "blk.2.* is missing"),
        ({"llama__attention__head_count": 0}, ConfigError, "num_attention_heads is 0"),
        ({"llama__attention__head_count_kv": [2, 2]}, CheckpointError, "head_count_kv is 2 values; it must be one integer"),
        ({"llama__attention__head_count": 8}, CheckpointError, r"attn_q.weight is \[64, 32\]; it must have 8 heads of 16 rows"),
        ({"llama__attention__value_length": 8}, ConfigError, "value_length is .*8.*, which is not supported: it must be the same"),
        ({"llama__rope__dimension_count": 8}, ConfigError, "rope.dimension_count is .*8.*, which is not supported"),
        ({"llama__rope__scaling__type": "yarn"}, ConfigError, "scaling.type is 'yarn', which is not supported: it must be 'none'"),
        ({"llama__expert_count": 8}, ConfigError, "expert_count is .*8.*, which is not supported: it must be 0"),
        ({"llama__attention__sliding_window": 512}, ConfigError, "sliding_window is .*512.*, which is not supported"),
        ({"llama__logit_scale": 2.0}, ConfigError, "llama.logit_scale is of a feature that is not supported"),
        (
            {f"llama__{name}": 1 << 24 for name in ("attention__key_length", "attention__value_length", "rope__dimension_count")},
            CheckpointError,
            "it must have 4 heads of 16777216 rows",
        ),
        ({"llama__rope__freq_base": float("nan")}, ConfigError, "rope_theta is nan"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(
    change: dict[str, Any], error: type[Exception], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=problem):
        load_gguf(_write(tmp_path / "model.gguf", **change))


@pytest.mark.parametrize(
    ("name", "value", "error", "problem"),
    [
        ("blk.1.ffn_up.weight", None, CheckpointError, "blk.1.ffn_up.weight is missing"),
        ("blk.0.attn_q.weight", None, CheckpointError, "tensor blk.0.attn_q.weight is missing; it must have 4 heads of 16 rows"),
        ("token_embd.weight", None, CheckpointError, "tensor token_embd.weight is missing"),
        ("blk.0.ffn_gate_inp.weight", np.ones((2, 32), np.float32), CheckpointError, "ffn_gate_inp.weight is not of this model"),
        ("blk.0.ffn_up.weight", np.ones((32, 64), np.float32), CheckpointError, r"ffn_up.weight is \[32, 64\], not \[64, 32\]"),
        ("rope_freqs.weight", np.linspace(1, 4, 8, dtype=np.float32), ConfigError, "rope_freqs.weight has factors"),
        ("rope_freqs.weight", np.zeros(8, np.float32), ConfigError, "rope_freqs.weight has factors"),
        ("rope_freqs.weight", np.ones(4, np.float32), ConfigError, "rope_freqs.weight has factors"),
    ],
)  # fmt: skip
def test_tensors_of_another_model_are_named(
    name: str, value: np.ndarray | None, error: type[Exception], problem: str, tmp_path: Path
) -> None:
    tensors = _tensors("tied") | {name: value}
    kept = {name: values for name, values in tensors.items() if values is not None}
    with pytest.raises(error, match=problem):
        load_gguf(write_gguf(tmp_path / "model.gguf", _metadata("tied"), kept))


def test_a_damaged_header_gives_our_errors_or_another_model(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf")
    content = path.read_bytes()
    header = content.index(b"output_norm.weight") + 4000
    place = st.integers(0, header - 1)

    @given(st.lists(st.tuples(place, st.integers(1, 255)), max_size=3), st.integers(0, len(content)))
    @settings(max_examples=120, deadline=5000)
    def check(flips: list[tuple[int, int]], size: int) -> None:
        damaged = bytearray(content)
        for where, bits in flips:
            damaged[where] ^= bits
        path.write_bytes(damaged[:size] if not flips else damaged)
        try:
            load_gguf(path)
        except PippinError as e:
            assert str(path) in str(e)

    tracemalloc.start()
    try:
        check()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
