"""Tokenizers for a run: trained on the training files, or taken as they are."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from pippin.core.errors import DataError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.input.config import SentencePieceConfig, TokenizerFilesConfig

_SENTENCE_BYTES = 4000  # the trainer leaves out longer ones


@runtime_checkable
class TokenizerSource(Protocol):
    """What provides the interface "tokenizer_source"."""

    def directory(self) -> Path | None:
        """Where the tokenizer lies, if it needs no training."""
        ...

    def settings(self) -> dict[str, object]:
        """What a trained tokenizer depends on beside the text, as a JSON object."""
        ...

    def training_bytes(self) -> int:
        """How much text `train` takes."""
        ...

    def train(self, texts: Iterable[str], directory: Path) -> None:
        """Writes the files of a tokenizer, trained on some texts, into a directory, which it makes."""
        ...


class TokenizerFiles:
    """A tokenizer that exists."""

    Config = TokenizerFilesConfig

    def __init__(self, cfg: TokenizerFilesConfig):
        self._directory = Path(cfg.directory).expanduser()

    def directory(self) -> Path | None:
        """The directory.

        Raises:
            DataError: it holds no tokenizer.
        """
        load_tokenizer(self._directory)
        return self._directory

    def settings(self) -> dict[str, object]:
        return {}

    def training_bytes(self) -> int:
        return 0

    def train(self, texts: Iterable[str], directory: Path) -> None:
        raise AssertionError("a tokenizer that exists is not trained")


class SentencePieceTraining:
    """A SentencePiece byte-pair encoding, equal for equal texts on every machine.

    Ids 0 to 3 are padding, end, unknown and beginning, as seqio wants them.

    Source: Kudo and Richardson 2018, arXiv:1808.06226; the settings are those of
    AFM, arXiv:2407.21075, section 2: split digits, byte fallback, no normalisation.
    """

    Config = SentencePieceConfig

    def __init__(self, cfg: SentencePieceConfig):
        self._cfg = cfg

    def directory(self) -> Path | None:
        return None

    def settings(self) -> dict[str, object]:
        return {name: getattr(self._cfg, name) for name in (f.name for f in dataclasses.fields(self._cfg))}

    def training_bytes(self) -> int:
        return self._cfg.training_bytes

    def train(self, texts: Iterable[str], directory: Path) -> None:
        """Trains on some texts and writes `tokenizer.model`.

        Raises:
            DataError: there is no text, or it has more characters than the vocabulary has room for.
        """
        import sentencepiece

        model, failures = io.BytesIO(), list[Exception]()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts, failures),
                model_writer=model,
                model_type="bpe",
                vocab_size=self._cfg.vocab_size,
                hard_vocab_limit=False,
                character_coverage=self._cfg.character_coverage,
                split_by_unicode_script=self._cfg.split_by_script,
                split_digits=True,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=2 * _SENTENCE_BYTES,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=3,
                minloglevel=2,
            )
        except RuntimeError as e:
            if failures:
                raise failures[0] from None
            raise DataError(
                f"SentencePiece cannot train {self._cfg.vocab_size} pieces on this text: {e}. Give it more text, "
                "or change vocab_size or character_coverage of the tokenizer."
            ) from None
        directory.mkdir(parents=True)
        (directory / "tokenizer.model").write_bytes(model.getvalue())


def _sentences(texts: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Texts in pieces that the trainer takes, cut at the ends of lines where there are any.

    It turns an error of the iterator into text, so the error itself is kept in `failures`.
    """
    try:
        for text in texts:
            lines, size = list[str](), 0
            for line in text.splitlines(keepends=True):
                for start in range(0, len(line), _SENTENCE_BYTES // 4):  # a character has 4 bytes at most
                    piece = line[start : start + _SENTENCE_BYTES // 4]
                    if size + len(piece.encode()) > _SENTENCE_BYTES:
                        yield "".join(lines)
                        lines, size = [], 0
                    lines.append(piece)
                    size += len(piece.encode())
            yield "".join(lines)
    except Exception as e:
        failures.append(e)
        raise
