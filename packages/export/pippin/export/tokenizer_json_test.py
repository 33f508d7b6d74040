"""A SentencePiece model and the tokenizer.json made of it cut text alike, or there is none."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress.text import evaluation_text
from pippin.export.tokenizer_json import write_special_ids, write_tokenizer_json


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
    assert theirs.encode(text, add_special_tokens=False).ids == own.encode(text)
    assert theirs.decode(own.encode(text)) == own.decode(own.encode(text)) == text
    # A text starts with what the model expects there, whoever reads it.
    assert theirs.encode(text, add_special_tokens=True).ids == [*own.start_ids, *own.encode(text)]
    assert own.start_ids == (own.bos_id,)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["eos_token"] == "</s>"


def test_the_ids_of_special_tokens_are_those_of_the_model(tmp_path):
    folder = _train(tmp_path / "t", model_type="bpe", pad_id=0, eos_id=1, unk_id=2, bos_id=3)
    write_special_ids(folder)
    ids = json.loads((folder / "config.json").read_text())
    assert ids == {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
    for there, added in (({"eos_token_id": 7}, {}), ({"max_position_embeddings": 64}, ids)):
        (folder / "config.json").write_text(json.dumps(there))
        write_special_ids(folder)
        assert json.loads((folder / "config.json").read_text()) == there | added


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
