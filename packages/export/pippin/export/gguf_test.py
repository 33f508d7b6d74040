"""GGUF files that are written hold what the model held."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.chat_template import load_chat_template
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.manifest import file_sha256, read_manifest
from pippin.core.module import flatten_params, split
from pippin.core.quantized_array import Scaled
from pippin.core.tokenizer import load_tokenizer
from pippin.export.gguf import export_gguf, main
from pippin.export.gguf_types import TYPES
from pippin.export.output import MANIFEST
from pippin.export.stacked_model import stacked_model
from pippin.export.tiny_models import (
    CONFIGS,
    TEMPLATE,
    VOCAB_SIZE,
    random_params,
    save_byte_level,
    save_sentencepiece,
    save_tiny,
)
from pippin.layers.feed_forward_config import Activation
from pippin.layers.gguf import GGUFModel, load_gguf
from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.layers.unrolled import unrolled
from pippin.v1 import export_pb2 as pb

_TEXTS = ["def main(): return 12", "it's  日本語 Ünïcödé\r\n\n<think>x</think>", "", "<|im_end|> 7\t"]


def _export(folder: Path, bundle: Path, **options: Any) -> Path:
    export_gguf(stacked_model(load_bundle(bundle)), folder / "model.gguf", **options)
    return folder / "model.gguf"


def _read(path: Path) -> GGUFModel:
    return load_gguf(path, cache_dir=path.parent / "cache")


def _assert_same(got: GGUFModel, name: str) -> None:
    assert got.config == CONFIGS[name]
    read, expected = flatten_params(got.params), flatten_params(random_params(name))
    assert read.keys() == expected.keys()
    for path, values in expected.items():
        assert read[path].tobytes() == values.tobytes(), path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    _assert_same(_read(_export(tmp_path, save_tiny(tmp_path / "bundle", name), type_name="F32")), name)


def test_a_model_without_stacks_gives_the_same_file(tmp_path: Path) -> None:
    bundle = load_bundle(save_tiny(tmp_path / "bundle"))
    cfg, params = unrolled(CONFIGS["tied"], random_params("tied"))
    save_bundle(tmp_path / "apart", cfg, params, tokenizer=bundle.tokenizer)
    (tmp_path / "other").mkdir()
    whole = _export(tmp_path, tmp_path / "bundle", type_name="F32")
    apart = _export(tmp_path / "other", tmp_path / "apart", type_name="F32")
    assert whole.read_bytes() == apart.read_bytes()


def test_float16_has_all_that_compressed_weights_have(tmp_path: Path) -> None:
    cfg, params = unrolled(CONFIGS["tied"], random_params("tied"))
    rng = np.random.default_rng(0)
    scaled = Scaled(
        rng.integers(-128, 128, (VOCAB_SIZE, 64)).astype(np.int8),
        rng.uniform(0.001, 0.01, (VOCAB_SIZE, 1)).astype(np.float16),
        8,
    )
    tokenizer = save_byte_level(tmp_path / "tokenizer")
    save_bundle(
        tmp_path / "bundle",
        cfg,
        {**params, "embedding": {"weight": scaled}},
        tokenizer=tokenizer,
        quantization_recipe="some",
    )
    path = _export(tmp_path, tmp_path / "bundle", type_name="F16")
    np.testing.assert_array_equal(_read(path).params["embedding"]["weight"], scaled.dequantized())
    assert read_manifest(tmp_path / "model", pb.ExportManifest, MANIFEST).recipe == "some"


def test_weights_that_were_rounded_in_training_go_out_as_they_were_rounded(tmp_path: Path) -> None:
    cfg = fake_quantized(bits=2, embedding_bits=4)(CONFIGS["tied"])
    _, params = split(cfg.build(rngs=nnx.Rngs(0)))
    tokenizer = save_byte_level(tmp_path / "tokenizer")
    save_bundle(tmp_path / "bundle", cfg, jax.tree.map(np.asarray, params), tokenizer=tokenizer)
    read = _read(_export(tmp_path, tmp_path / "bundle", type_name="F16"))  # which holds all their levels
    assert read.config == CONFIGS["tied"]
    group = flatten_params(read.params)["decoder.layer.attention.q_proj.weight"][1, :, 16:32]
    assert len(np.unique(group)) == 4


@pytest.mark.parametrize("make", [save_byte_level, save_sentencepiece])
def test_the_tokenizer_comes_back(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "tokenizer")
    path = _export(tmp_path, save_tiny(tmp_path / "bundle", tokenizer=folder))
    read = _read(path).tokenizer
    assert read is not None
    before, after = load_tokenizer(folder), load_tokenizer(read)
    for text in _TEXTS:
        assert after.encode(text) == before.encode(text), text
    for name in ("bos_id", "eos_id", "eos_ids", "start_ids", "special_tokens"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.vocab_size == VOCAB_SIZE  # ids without a token are filled up


def test_the_chat_template_and_the_context_come_back(tmp_path: Path) -> None:
    read = _read(_export(tmp_path, save_tiny(tmp_path / "bundle"))).tokenizer
    assert read is not None
    assert json.loads((read / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    template = load_chat_template(read)
    assert template is not None
    assert template.render([{"role": "user", "content": "a"}]) == "<|im_start|>user\na<|im_end|>\n"
    assert json.loads((read / "config.json").read_text())["max_position_embeddings"] == 128


@pytest.mark.parametrize("name", TYPES)
def test_each_type_is_close_to_the_weights(name: str, tmp_path: Path) -> None:
    got = _read(_export(tmp_path, save_tiny(tmp_path / "bundle", "untied"), type_name=name))
    expected = flatten_params(random_params("untied"))
    bits = {"F32": 24, "F16": 11, "BF16": 8}.get(name) or int(name[1])
    for path, values in flatten_params(got.params).items():
        # Norms and biases are exact, and blocks of 32 have a scale for their largest.
        bound = 0.0 if path.endswith("scale") else np.abs(expected[path]).max() * 2.0 ** (1 - bits)
        assert np.abs(values - expected[path]).max() <= bound, path


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("tied", {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0", "blk.1.attn_norm.weight": "F32"}),
        ("untied", {"token_embd.weight": "Q4_0", "output.weight": "Q8_0", "blk.0.ffn_down.weight": "Q4_0"}),
    ],
)  # fmt: skip
def test_what_makes_logits_and_norms_keep_more_bits(name: str, types: dict[str, str], tmp_path: Path) -> None:
    path = _export(tmp_path, save_tiny(tmp_path / "bundle", name), type_name="Q4_0")
    got = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types.items() <= got.items()


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path: Path) -> None:
    narrow = {"decoder.layer.feed_forward.hidden_dim": 40}
    cfg = override(CONFIGS["tied"], narrow)
    params = random_params("tied")
    layer = params["decoder"]["layer"]
    cut = {
        "gate_proj": {"weight": layer["feed_forward"]["gate_proj"]["weight"][..., :40]},
        "up_proj": {"weight": layer["feed_forward"]["up_proj"]["weight"][..., :40]},
        "down_proj": {"weight": layer["feed_forward"]["down_proj"]["weight"][:, :40]},
    }
    params = {**params, "decoder": {"layer": {**layer, "feed_forward": cut}}}
    save_bundle(tmp_path / "bundle", cfg, params, tokenizer=save_byte_level(tmp_path / "tokenizer"))
    path = _export(tmp_path, tmp_path / "bundle", type_name="Q4_0")
    got = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (got["blk.0.ffn_down.weight"], got["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    path = _export(tmp_path, save_tiny(tmp_path / "bundle"), type_name="Q4_0")
    message = read_manifest(tmp_path / "model", pb.ExportManifest, MANIFEST)
    assert (message.target, message.context_length) == ("gguf", 128)
    assert [(f.path, f.bytes, f.sha256) for f in message.files] == [
        ("model.gguf", path.stat().st_size, file_sha256(path))
    ]
    weights = {weight.name: weight for weight in message.weights}
    query = weights["decoder.layers.1.attention.q_proj.weight"]
    assert (query.scheme, query.bits, query.bytes, query.count) == ("Q4_0", 4, 64 * 64 * 18 // 32, 64 * 64)
    in_file = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert sum(weight.bytes for weight in message.weights) == in_file
    assert message.bits_per_weight == pytest.approx(8 * in_file / sum(w.count for w in message.weights))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("tied", {"decoder.layer.feed_forward.activation": Activation.GELU}, "hidden_act 'gelu_pytorch_tanh'; .* 'silu'"),
        ("normed", {f"decoder.layer.attention.{p}_proj.bias": True for p in "qkvo"}, "attention_bias True"),
        ("tied", {"decoder.layer.attention.window": 32}, "It differs .*window: None -> 32"),
    ],
)  # fmt: skip
def test_a_tree_that_gguf_cannot_express_is_refused(
    name: str, change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model = stacked_model(load_bundle(save_tiny(tmp_path / "bundle", name)))
    model = type(model)(
        override(model.config, change), model.parameters, model.tokenizer, model.signature, ""
    )
    with pytest.raises(ConfigError, match=problem):
        export_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*model*"))


def test_layers_that_differ_are_refused(tmp_path: Path) -> None:
    cfg, params = unrolled(CONFIGS["tied"], random_params("tied"))
    cfg = override(cfg, {"decoder.layers.1.attention.window": 32})
    save_bundle(tmp_path / "bundle", cfg, params)
    with pytest.raises(
        ConfigError, match=r"layers 0 and 1 of the model differ in .*window.*one description for all"
    ):
        stacked_model(load_bundle(tmp_path / "bundle"))


def test_a_weight_that_is_no_number_or_too_large_leaves_nothing(tmp_path: Path) -> None:
    for value, options, problem in (
        (np.nan, {}, "decoder.layer.attention.q_proj.weight holds NaN or infinity"),
        (np.inf, {}, "holds NaN or infinity"),
        (1e6, {"type_name": "F16"}, "q_proj.weight reaches 1e.06, which F16 cannot hold"),
        (1e9, {"type_name": "Q8_0"}, "reaches 1e.09, which Q8_0 cannot hold"),
    ):
        params = random_params("tied")
        weight = params["decoder"]["layer"]["attention"]["q_proj"]["weight"].copy()
        weight[1, 2, 3] = value
        attention = {**params["decoder"]["layer"]["attention"], "q_proj": {"weight": weight}}
        params = {**params, "decoder": {"layer": {**params["decoder"]["layer"], "attention": attention}}}
        folder = tmp_path / f"{value}"
        folder.mkdir()
        save_bundle(
            folder / "bundle", CONFIGS["tied"], params, tokenizer=save_byte_level(folder / "tokenizer")
        )
        with pytest.raises(CheckpointError, match=problem):
            _export(folder, folder / "bundle", **options)
        assert sorted(p.name for p in folder.iterdir()) == ["bundle", "tokenizer"]


def test_what_is_there_already_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_tiny(tmp_path / "bundle")
    (tmp_path / "model.gguf").write_text("mine")
    assert main(["--model", str(bundle), "--out", str(tmp_path / "model.gguf")]) == 2
    assert "model.gguf is there already. Remove it" in capsys.readouterr().err
    (tmp_path / "model.gguf").rename(tmp_path / "model")
    assert main(["--model", str(bundle), "--out", str(tmp_path / "model.gguf")]) == 2
    assert "model is there already" in capsys.readouterr().err
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--out", "model.gguf", "--type", "Q4_K"], "there is no type 'Q4_K' to write. Choose one of F32, F16"),
        (["--out", "model.bin"], "model.bin does not end in .gguf"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    save_tiny(tmp_path / "bundle")
    assert main(["--model", "bundle", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_the_command_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    save_tiny(tmp_path / "bundle")
    assert main(["--model", "bundle", "--out", "model.gguf", "--type", "F32", "--context-length", "64"]) == 0
    assert "32 bits per weight" in capsys.readouterr().out
    _assert_same(_read(tmp_path / "model.gguf"), "tied")
    assert read_manifest(tmp_path / "model", pb.ExportManifest, MANIFEST).context_length == 64
