"""Tests of the text that models are measured on: literal rows, and that no paragraph is on both sides."""

import dataclasses
from typing import cast

import numpy as np
import pytest

from pippin.core.errors import ConfigError, DataError
from pippin.core.tokenizer import Tokenizer
from pippin.export.compress.config import TextConfig
from pippin.export.compress.testing import make_tokenizer
from pippin.export.compress.text import batches, calibration_text, evaluation_text


@dataclasses.dataclass
class Starting:
    """A tokenizer that has a model expect tokens before each text."""

    encode: object
    start_ids: tuple[int, ...]


def test_rows_follow_each_other(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    ids = tokenizer.encode("abcdefghijk")
    rows = batches(TextConfig(tokens=8, sequence_length=4), "abcdefghijk" * 50, tokenizer)
    assert [row["tokens"].tolist()[0] for row in rows] == [ids[0:4], ids[4:8]]
    assert [row["targets"].tolist()[0] for row in rows] == [ids[1:5], ids[5:9]]
    np.testing.assert_array_equal(rows[0]["positions"], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(rows[0]["loss_weights"], np.ones((1, 4)))


def test_what_starts_a_text_starts_each_row_and_does_not_count(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    ids = tokenizer.encode("abcdefghijk")
    rows = batches(
        TextConfig(tokens=8, sequence_length=4),
        "abcdefghijk" * 50,
        cast(Tokenizer, Starting(tokenizer.encode, (7, 8))),
    )
    assert rows[1]["tokens"].tolist() == [[7, 8, *ids[4:7]]]
    assert rows[1]["targets"].tolist() == [[8, *ids[4:8]]]
    assert rows[1]["loss_weights"].tolist() == [[0, 1, 1, 1, 1]]


def test_a_short_text_is_one_short_row(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    (row,) = batches(TextConfig(), "abcdef", tokenizer)
    assert row["tokens"].tolist() == [tokenizer.encode("abcdef")[:-1]]


def test_of_fewer_tokens_than_a_sequence_has_one_row_is_as_long_as_they_are(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    (row,) = batches(TextConfig(tokens=8), "abcdefghijk" * 50, tokenizer)
    assert row["targets"].tolist() == [tokenizer.encode("abcdefghijk")[1:9]]
    (row,) = batches(
        TextConfig(tokens=8), "abcdefghijk" * 50, cast(Tokenizer, Starting(tokenizer.encode, (7,)))
    )
    assert row["tokens"].tolist() == [[7, *tokenizer.encode("abcdefghijk")[:7]]]


def test_the_default_texts_share_no_paragraph():
    sides = [{p for p in text.split("\n\n") if p.strip()} for text in (calibration_text(), evaluation_text())]
    assert not sides[0] & sides[1]
    assert min(len(calibration_text()), len(evaluation_text())) > 100_000


def test_a_file_is_read_or_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    (tmp_path / "text").write_text("übers Wetter")
    assert batches(TextConfig(file=str(tmp_path / "text")), "", tokenizer)
    (tmp_path / "latin").write_bytes("übers Wetter".encode("latin-1"))
    with pytest.raises(DataError, match="latin is not UTF-8.*Convert it"):
        batches(TextConfig(file=str(tmp_path / "latin")), "", tokenizer)
    with pytest.raises(DataError, match="absent cannot be read: No such file"):
        batches(TextConfig(file=str(tmp_path / "absent")), "", tokenizer)
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="empty has 0 tokens; a model is measured on 2 at least"):
        batches(TextConfig(file=str(tmp_path / "empty")), "", tokenizer)
    with pytest.raises(ConfigError, match=r"tokens \(0\)"):
        TextConfig(tokens=0)
