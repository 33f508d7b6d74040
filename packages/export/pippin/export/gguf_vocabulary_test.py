"""Tokenizers that GGUF cannot express are refused by what they have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import ConfigError
from pippin.core.gguf_tokenizer import ways_to_split
from pippin.export.gguf_vocabulary import vocabulary_metadata
from pippin.export.tiny_models import VOCAB_SIZE, save_byte_level, save_sentencepiece


def _changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = save_byte_level(folder) / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return folder


def _set_way(raw: dict[str, Any], way: str) -> None:
    raw.update(ways_to_split()[way])
    raw["model"]["ignore_merges"] = way == "llama-bpe"


@pytest.mark.parametrize("way", ways_to_split())
def test_each_way_to_split_has_its_name(way: str, tmp_path: Path) -> None:
    folder = _changed(tmp_path / "tokenizer", lambda raw: _set_way(raw, way))
    assert vocabulary_metadata(folder, VOCAB_SIZE)["tokenizer.ggml.pre"] == way


def test_a_step_that_is_written_in_another_way_is_known(tmp_path: Path) -> None:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}  # GPT-2's own
    folder = _changed(tmp_path / "tokenizer", lambda raw: raw.update(pre_tokenizer=step))
    assert vocabulary_metadata(folder, VOCAB_SIZE)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw["model"].update(ignore_merges=True), "ignore_merges is True; where text is split as 'smollm'"),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>', which GGUF cannot"),
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "normalises and splits text by .*NFKC.* no name"),
        (
            lambda raw: raw.update(pre_tokenizer={"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}),
            "of kind 'BPE' without a ByteLevel step",
        ),
    ],
)  # fmt: skip
def test_what_a_byte_level_tokenizer_may_not_have(
    change: Callable[[dict[str, Any]], object], problem: str, tmp_path: Path
) -> None:
    folder = _changed(tmp_path / "tokenizer", change)
    with pytest.raises(ConfigError, match=problem):
        vocabulary_metadata(folder, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_type": "unigram", "vocab_size": 300}, "model_type is unigram, which GGUF cannot express: it must be BPE"),
        ({"byte_fallback": False, "vocab_size": 60}, "byte_fallback is False"),
        ({"normalization_rule_name": "nfkc"}, "precompiled_charsmap is [0-9]+"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
    ],
)  # fmt: skip
def test_what_a_sentencepiece_model_may_not_have(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    folder = save_sentencepiece(tmp_path / "tokenizer", **settings)
    with pytest.raises(ConfigError, match=problem):
        vocabulary_metadata(folder, VOCAB_SIZE)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the tokenizer has 312 tokens, and the model 200\. .* own tokenizer"
    ):
        vocabulary_metadata(save_byte_level(tmp_path / "tokenizer"), 200)
