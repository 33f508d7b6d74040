"""Text to measure models on, as batches of token ids. NumPy only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pippin.core.batch import Batch
from pippin.core.errors import DataError
from pippin.core.tokenizer import Tokenizer
from pippin.export.compress.config import TextConfig


def calibration_text() -> str:
    """Half of Python's own documentation: what `help()` shows of topics."""
    return "\n\n".join(_topics()[0::2])


def evaluation_text() -> str:
    """The other half. No paragraph is in both."""
    return "\n\n".join(_topics()[1::2])


def _topics() -> list[str]:
    from pydoc_data.topics import topics  # half a megabyte

    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        # Some topics repeat others.
        paragraphs = [p for p in re.split(r"\n{2,}", topics[name].strip()) if p.strip()]
        new = [p for p in paragraphs if p not in seen]
        seen.update(new)
        if len(new) > len(paragraphs) // 2:
            texts.append("\n\n".join(new))
    return texts


def batches(cfg: TextConfig, default: str, tokenizer: Tokenizer) -> list[Batch]:
    """The text as rows of one sequence each, which follow each other without overlap.

    All are of one length. Each starts with what the tokenizer has models expect before a text, which does not count. The
    end of a text that fills no whole sequence is left out, unless there is no other.

    Args:
        cfg: which text, and how much of it.
        default: the text if `cfg` names no file.
        tokenizer: of the model.

    Raises:
        DataError: the file cannot be read, or has too little text.
    """
    text = default if cfg.file is None else _read(Path(cfg.file))
    start = list(tokenizer.start_ids)
    # A text is not encoded whole for its beginning: most tokens are of fewer characters than eight.
    for share in (8, 64, None):
        ids = tokenizer.encode(text[: None if share is None else cfg.tokens * share])
        if len(ids) > cfg.tokens:
            break
    ids = ids[: cfg.tokens + (not start)]
    length = min(cfg.sequence_length, len(ids) - (not start))
    if length < 1:
        source = cfg.file or "the default text"
        raise DataError(
            f"{source} has {len(ids)} tokens; a model is measured on 2 at least. Give a longer text."
        )
    return list(_rows(ids, length, start))


def _rows(ids: list[int], length: int, start: list[int]) -> Iterator[Batch]:
    read = 0 if start else 1  # where nothing comes before it, the first token of a row is not predicted
    for begin in range(0, len(ids) - length - read + 1, length):
        row = [*start, *ids[begin : begin + length + read]]
        tokens, targets = np.array(row[:-1], np.int32)[None], np.array(row[1:], np.int32)[None]
        weights = np.ones(tokens.shape, np.float32)
        weights[:, : max(len(start) - 1, 0)] = 0
        yield Batch(
            tokens=tokens,
            targets=targets,
            positions=np.arange(tokens.shape[1], dtype=np.int32)[None],
            segment_ids=np.ones(tokens.shape, np.int32),
            loss_weights=weights,
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise DataError(f"the text {path} cannot be read: {e.strerror}. Give a file of UTF-8 text.") from None
    except UnicodeDecodeError as e:
        raise DataError(f"the text {path} is not UTF-8: {e}. Convert it.") from None
