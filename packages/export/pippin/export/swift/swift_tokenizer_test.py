"""A tokenizer's folder has what swift-transformers reads, and is the same tokenizer."""

import json

import pytest

from pippin.core.chat_template import load_chat_template
from pippin.core.tokenizer import load_tokenizer
from pippin.export.swift.swift_tokenizer import complete_tokenizer
from pippin.export.tiny_models import TEMPLATE, save_byte_level, save_sentencepiece

_CONVERSATION = [{"role": "user", "content": "def main"}]


def _config(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_a_chat_template_of_its_own_file_comes_to_the_others(tmp_path):
    folder = save_byte_level(tmp_path / "t", chat_template=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").unlink()
    template = load_chat_template(folder)
    assert template is not None
    before = template.encode(_CONVERSATION)
    assert complete_tokenizer(folder)
    assert _config(folder)["chat_template"] == TEMPLATE
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    after = load_chat_template(folder)
    assert after is not None and after.encode(_CONVERSATION) == before


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "PreTrainedTokenizerFast"),
        ("GPT2Tokenizer", "GPT2Tokenizer"),
    ],
)
def test_its_class_is_one_that_is_known(tmp_path, named, told):
    folder = save_byte_level(tmp_path / "t", tokenizer_class=named)
    assert complete_tokenizer(folder)
    assert _config(folder)["tokenizer_class"] == told


@pytest.mark.parametrize(("kind", "told"), [("bpe", "PreTrainedTokenizerFast"), ("unigram", "T5Tokenizer")])
def test_a_sentencepiece_model_is_complete(tmp_path, kind, told):
    folder = save_sentencepiece(tmp_path / "t", model_type=kind)
    before = load_tokenizer(folder)
    assert complete_tokenizer(folder)
    after = load_tokenizer(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (after.start_ids, after.eos_ids) == (before.start_ids, before.eos_ids) == ((3,), {1})
    assert _config(folder)["tokenizer_class"] == told


def test_what_is_complete_stays_as_it_is(tmp_path):
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "{{ tools }}"}]
    folder = save_byte_level(tmp_path / "t", chat_template=named, tokenizer_class="GPT2Tokenizer")
    assert complete_tokenizer(folder)
    assert _config(folder)["chat_template"] == named
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert complete_tokenizer(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_without_a_tokenizer_gets_none(tmp_path):
    assert not complete_tokenizer(tmp_path / "none")
