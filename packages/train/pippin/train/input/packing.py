"""Token streams to packed rows: windows of long documents, short ones side by side.

A row is an array [3, T]: tokens (inputs), targets (the token after each input)
and segment ids (1, 2, ... for the documents of the row; 0 is padding).

Every token of every document but its start is a target exactly once: a
document longer than a row goes on in the next window, whose first input is the
last target of the window before. What is left of a document shares a row with
others; the row with the least room that is still enough takes it (best fit).

seqio's own `trim_and_pack_dataset` is not used: it closes a row as soon as one
document does not fit (8 % padding on the standard library where this leaves
under 1 %), takes id 0 for padding, which in Llama 3's vocabulary is a letter,
and pads T documents to one array, 8 GB at 32,768 tokens.

Source: best-fit packing, Ding et al. 2024, arXiv:2404.10830.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, Integer

from pippin.core.batch import Batch

TOKENS, TARGETS, SEGMENTS = 0, 1, 2  # planes of a row

_OPEN_ROWS = 64  # rows with room that wait for documents


class _OpenRow:
    """A row with room: its array, the tokens and the documents in it."""

    def __init__(self, array: np.ndarray):
        self.array, self.used, self.documents = array, 0, 0


class Packer:
    """Packs documents, given part after part, into rows.

    Args:
        sequence_length: T.
        start_id: the first input of each document; None where it begins with its own first token.
        end_id: the last target of each document; None for none.
        pad_id: what fills the rest of a row.
    """

    def __init__(self, sequence_length: int, start_id: int | None, end_id: int | None, pad_id: int):
        self._length = sequence_length
        self._start = [] if start_id is None else [start_id]
        self._end = [] if end_id is None else [end_id]
        self._pad_id = pad_id
        self._rest = np.zeros(
            0, np.int32
        )  # of the document so far: what is in no row, after one token that is
        self._open: list[_OpenRow] = []  # oldest first

    def add(
        self, ids: Sequence[int] | Integer[np.ndarray, " n"], *, starts: bool = True, ends: bool = True
    ) -> Iterator[Int[np.ndarray, "3 T"]]:
        """Takes a part of a document; yields the rows that are complete."""
        if starts:
            yield from self._end_document()
        pieces = [self._rest, self._start if starts else [], ids, self._end if ends else []]
        rest = np.concatenate([np.asarray(p, np.int32) for p in pieces])
        begin = 0
        while len(rest) - begin > self._length:
            row = self._empty_row()
            self._write(row, rest[begin : begin + self._length + 1])
            yield row.array
            begin += self._length
        self._rest = rest[begin:]
        if ends:
            yield from self._end_document()

    def flush(self) -> Iterator[Int[np.ndarray, "3 T"]]:
        """Yields the rows that still have room, when no document follows."""
        yield from self._end_document()
        yield from (row.array for row in self._open)
        self._open.clear()

    def _end_document(self) -> Iterator[np.ndarray]:
        rest, self._rest = self._rest, np.zeros(0, np.int32)
        size = len(rest) - 1  # pairs of input and target
        if size < 1:
            return
        fitting = [row for row in self._open if row.used + size <= self._length]
        if fitting:
            row = max(fitting, key=lambda row: row.used)
        else:
            if len(self._open) == _OPEN_ROWS:
                fullest = max(self._open, key=lambda row: row.used)
                self._open.remove(fullest)
                yield fullest.array
            row = self._empty_row()
            self._open.append(row)
        self._write(row, rest)
        if row.used == self._length:
            self._open.remove(row)
            yield row.array

    def _empty_row(self) -> _OpenRow:
        array = np.full((3, self._length), self._pad_id, np.int32)
        array[SEGMENTS] = 0
        return _OpenRow(array)

    def _write(self, row: _OpenRow, ids: np.ndarray) -> None:
        """Puts a run of ids, each the target of the one before, behind what the row has."""
        place = slice(row.used, row.used + len(ids) - 1)
        row.used, row.documents = place.stop, row.documents + 1
        row.array[TOKENS, place], row.array[TARGETS, place] = ids[:-1], ids[1:]
        row.array[SEGMENTS, place] = row.documents


def to_batch(rows: Integer[np.ndarray, "B 3 T"]) -> Batch:
    """The batch of packed rows [B, 3, T] of any integers."""
    segment_ids = rows[:, SEGMENTS].astype(np.int32)
    steps = np.arange(rows.shape[-1], dtype=np.int32)
    begins = np.diff(segment_ids, axis=1, prepend=0) != 0
    first = np.maximum.accumulate(np.where(begins, steps, 0), axis=1)  # of the document that holds each place
    return Batch(
        tokens=rows[:, TOKENS].astype(np.int32),
        targets=rows[:, TARGETS].astype(np.int32),
        positions=np.where(segment_ids > 0, steps - first, 0).astype(np.int32),
        segment_ids=segment_ids,
        loss_weights=(segment_ids > 0).astype(np.float32),
    )
