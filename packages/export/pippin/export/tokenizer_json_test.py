"""A SentencePiece model and the tokenizer.json made of it cut text alike, or there is none."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress.text import evaluation_text
from pippin.export.tokenizer_json import write_tokenizer_json


def _train(folder, **options):
    model = io.BytesIO()
    sentences = [line for line in evaluation_text()[:60_000].splitlines() if line]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
        **({"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options),
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize(("kind", "prefix"), [("bpe", False), ("bpe", True), ("unigram", False)])
def test_both_cut_text_alike(tmp_path, kind, prefix):
    folder = _train(tmp_path / "t", model_type=kind, add_dummy_prefix=prefix)
    assert write_tokenizer_json(folder)
    theirs, text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), "def f(x):  return 'é' * 3"
    (folder / "tokenizer.json").rename(tmp_path / "aside")  # load_tokenizer would take it
    own = load_tokenizer(folder)
    assert theirs.encode(text).ids == own.encode(text)
    assert theirs.decode(own.encode(text)) == own.decode(own.encode(text)) == text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["eos_token"] == "</s>"


def test_where_they_would_differ_there_is_none(tmp_path):
    # It makes one character of several, before it cuts.
    folder = _train(
        tmp_path / "t", model_type="bpe", normalization_rule_name="nfkc", remove_extra_whitespaces=True
    )
    assert not write_tokenizer_json(folder)
    assert [p.name for p in folder.iterdir()] == ["tokenizer.model"]


def test_one_that_is_there_stays(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert write_tokenizer_json(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
