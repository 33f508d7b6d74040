"""Folders for transformers that are written hold what the model held."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.manifest import file_sha256, read_manifest
from pippin.core.module import flatten_params, split
from pippin.core.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from pippin.export import output
from pippin.export.huggingface import export_huggingface, main
from pippin.export.model_source import open_source
from pippin.export.output import MANIFEST
from pippin.export.stacked_model import stacked_model
from pippin.export.tiny_models import CONFIGS, random_params, save_sentencepiece, save_tiny
from pippin.layers.huggingface import load_huggingface
from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.layers.quant.settle import settled
from pippin.layers.unrolled import unrolled
from pippin.v1 import export_pb2 as pb


def _export(bundle: Path, out: Path, **options: Any) -> pb.ExportManifest:
    return export_huggingface(stacked_model(load_bundle(bundle)), out, **options)


def _weights(folder: Path) -> dict[str, np.ndarray]:
    return flatten_params(load_huggingface(folder).params)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    _export(save_tiny(tmp_path / "bundle", name), tmp_path / "out")
    assert load_huggingface(tmp_path / "out").config == CONFIGS[name]
    got, expected = _weights(tmp_path / "out"), flatten_params(random_params(name))
    assert got.keys() == expected.keys()
    for path, values in expected.items():
        assert got[path].tobytes() == values.tobytes(), path


def test_a_model_without_stacks_gives_the_same_files(tmp_path: Path) -> None:
    bundle = load_bundle(save_tiny(tmp_path / "bundle"))
    cfg, params = unrolled(CONFIGS["tied"], random_params("tied"))
    save_bundle(tmp_path / "apart", cfg, params, tokenizer=bundle.tokenizer)
    _export(tmp_path / "bundle", tmp_path / "one")
    _export(tmp_path / "apart", tmp_path / "other")
    for file in (tmp_path / "one").iterdir():
        if file.name != MANIFEST:
            assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_get_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    message = _export(save_tiny(tmp_path / "bundle"), tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    for path, values in flatten_params(random_params("tied")).items():
        np.testing.assert_array_equal(_weights(tmp_path / "out")[path], values.astype(dtype), err_msg=path)
    assert message.bits_per_weight == 16


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    bundle = save_tiny(tmp_path / "bundle")
    _export(bundle, tmp_path / "out")
    before, after = load_tokenizer(bundle / "tokenizer"), load_tokenizer(tmp_path / "out")
    assert after.encode("def main") == before.encode("def main") and after.eos_ids == before.eos_ids


def test_a_sentencepiece_model_goes_along_with_what_transformers_reads(tmp_path: Path) -> None:
    folder = save_sentencepiece(tmp_path / "tokenizer")
    message = _export(save_tiny(tmp_path / "bundle", tokenizer=folder), tmp_path / "out")
    before, after = load_tokenizer(folder), load_tokenizer(tmp_path / "out")
    assert isinstance(before, SentencePieceTokenizer) and isinstance(after, JsonTokenizer)
    for text in ("def main(): return 12", "  é\t日本語"):
        assert after.encode(text) == before.encode(text), text
    for name in ("bos_id", "eos_id", "pad_id", "eos_ids", "start_ids"):
        assert getattr(after, name) == getattr(before, name), name
    assert before.start_ids == (3,)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("pad", "eos", "bos")] == [0, 1, 3]
    assert {f"out/tokenizer{name}" for name in (".json", ".model", "_config.json")} <= {
        file.path for file in message.files
    }
    assert [path.name for path in folder.iterdir()] == ["tokenizer.model"]


def test_a_sentencepiece_model_that_no_json_gives_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_sentencepiece(
        tmp_path / "tokenizer", normalization_rule_name="nfkc", remove_extra_whitespaces=True
    )
    save_tiny(tmp_path / "bundle", tokenizer=folder)
    assert main(["--model", str(tmp_path / "bundle"), "--out", str(tmp_path / "out")]) == 0
    assert "no tokenizer.json gives the same tokens" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_weights_that_were_rounded_in_training_go_out_as_they_were_rounded(tmp_path: Path) -> None:
    cfg = fake_quantized(bits=2, embedding_bits=4)(CONFIGS["tied"])
    _, params = split(cfg.build(rngs=nnx.Rngs(0)))
    params = jax.tree.map(np.asarray, params)
    bundle = save_bundle(tmp_path / "bundle", cfg, params)
    message = _export(bundle, tmp_path / "out")
    assert load_huggingface(tmp_path / "out").config == CONFIGS["tied"]
    assert message.model_signature == open_source(bundle).signature
    got, (_, expected) = _weights(tmp_path / "out"), settled(cfg, params)
    for path, values in flatten_params(expected).items():
        layer = re.match(r"decoder\.layers\.(\d+)\.", path)
        found = got[path.replace(layer[0], "decoder.layer.")][int(layer[1])] if layer else got[path]
        values = values if isinstance(values, np.ndarray) else values.dequantized()
        np.testing.assert_array_equal(found, values, err_msg=path)
    group = got["decoder.layer.feed_forward.down_proj.weight"][0, :, :16]
    assert len(np.unique(group)) == 4
    assert len(np.unique(got["embedding.weight"][:16])) == 16


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    _export(save_tiny(tmp_path / "bundle"), tmp_path / "out")
    message = read_manifest(tmp_path / "out", pb.ExportManifest, MANIFEST)
    assert message.target == "huggingface"
    files = {file.path: file for file in message.files}
    there = {f"out/{p.name}" for p in (tmp_path / "out").iterdir()} - {f"out/{MANIFEST}"}
    assert files.keys() == there
    for path, file in files.items():
        assert (file.bytes, file.sha256) == ((tmp_path / path).stat().st_size, file_sha256(tmp_path / path))
    weights = {weight.name: weight for weight in message.weights}
    down = weights["decoder.layers.1.feed_forward.down_proj.weight"]
    assert (down.scheme, down.bits, down.bytes, down.count) == ("float32", 32, 4 * 96 * 64, 96 * 64)
    assert message.bits_per_weight == 32


def test_what_config_json_cannot_say_is_refused(tmp_path: Path) -> None:
    model = stacked_model(load_bundle(save_tiny(tmp_path / "bundle")))
    windowed = override(model.config, {"decoder.layer.attention.window": 32})
    model = type(model)(windowed, model.parameters, model.tokenizer, model.signature, "")
    with pytest.raises(ConfigError, match="config.json cannot describe it. It differs .*window: None -> 32"):
        export_huggingface(model, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_weight_that_is_no_number_or_too_large_leaves_nothing(tmp_path: Path) -> None:
    for value, problem in (
        (np.nan, "norm.scale holds NaN or infinity, which no runtime"),
        (1e6, "norm.scale reaches 1e.06, which is infinite in float16. Export it as bfloat16 or float32"),
    ):
        params = random_params("tied")
        scale = params["norm"]["scale"].copy()
        scale[7] = value
        save_bundle(tmp_path / f"{value}", CONFIGS["tied"], {**params, "norm": {"scale": scale}})
        with pytest.raises(CheckpointError, match=problem):
            _export(tmp_path / f"{value}", tmp_path / "out", dtype="float16")
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_without_room_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = save_tiny(tmp_path / "bundle")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    with pytest.raises(CheckpointError, match="takes about .* MB; the disk has 0 MB left. Make room"):
        _export(bundle, tmp_path / "out")


def test_the_command_writes_a_folder_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    save_tiny(tmp_path / "bundle")
    assert main(["--model", "bundle", "--out", "out", "--dtype", "bfloat16"]) == 0
    assert "16 bits per weight" in capsys.readouterr().out
    assert main(["--model", "bundle", "--out", "out"]) == 2
    assert "out is there already. Remove it" in capsys.readouterr().err
    assert main(["--model", "nothing", "--out", "other"]) == 2
    assert "nothing is neither a file" in capsys.readouterr().err
