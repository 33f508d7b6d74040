from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import DataError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.input.config import SentencePieceConfig, TokenizerFilesConfig
from pippin.train.input.testing import write_letter_tokenizer

_TEXT = "def total(items: list[int]) -> int:\n    return sum(items, 1234)\n\n\n" * 50


def _train(directory: Path, texts: list[str], **fields: Any) -> Path:
    SentencePieceConfig(**{"vocab_size": 400, **fields}).build().train(texts, directory)
    return directory


def test_a_trained_tokenizer_is_lossless_and_splits_digits(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_train(tmp_path / "t", [_TEXT]))
    for text in (_TEXT, "  \t\n\n   ", "é 👩\u200d👧 \u2581 x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == len(tokenizer.encode("return")) + 3
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 3)
    assert tokenizer.vocab_size <= 400


def test_pieces_span_the_end_of_a_line(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_train(tmp_path / "t", [_TEXT]))
    assert len(tokenizer.encode(":\n")) == 1
    assert len(tokenizer.encode("    ")) == 1


def test_equal_texts_give_equal_tokenizers(tmp_path: Path) -> None:
    models = [(_train(tmp_path / name, [_TEXT]) / "tokenizer.model").read_bytes() for name in ("a", "b")]
    assert models[0] == models[1]


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_train(tmp_path / "t", ["word " * 50_000]))
    assert len(tokenizer.encode("word word")) == 2


def test_text_without_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot train 400 pieces on this text: .*Give it more text"):
        _train(tmp_path / "t", [])
    assert not (tmp_path / "t").exists()


def test_more_characters_than_pieces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="cannot train 300 pieces .* or change vocab_size or character_coverage"
    ):
        _train(
            tmp_path / "t", ["".join(map(chr, range(0x4E00, 0x4E80)))], vocab_size=300, character_coverage=1.0
        )


def test_an_error_of_the_texts_is_raised_as_it_is(tmp_path: Path) -> None:
    def texts():
        yield _TEXT
        raise DataError("line 7 is broken")

    with pytest.raises(DataError, match="^line 7 is broken$"):
        SentencePieceConfig().build().train(texts(), tmp_path / "t")


def test_a_tokenizer_that_exists_is_where_the_config_says(tmp_path: Path) -> None:
    source = TokenizerFilesConfig(directory=str(write_letter_tokenizer(tmp_path / "letters"))).build()
    assert source.directory() == tmp_path / "letters"
    with pytest.raises(DataError, match="missing holds no tokenizer"):
        TokenizerFilesConfig(directory=str(tmp_path / "missing")).build().directory()
