"""Text from files, a part at a time: .txt, .jsonl, .jsonl.gz and .parquet.

A file is a sequence of units: rows, or blocks of a text file. One in every so
many units is held out from training; which ones depends on the file's name and
the unit's number alone, unless files are held out whole (`Split.of_files`). Each
pass sees the units of one side, so that a defect is counted once.

No file is held in memory whole, except as its format demands: a row of JSON,
and the row group of a parquet file.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pippin.train.input.rejects import Defect, Rejects

_BLOCK_BYTES = 16 * 1024  # of a file that is one unit, read a part at a time
_PART_CHARACTERS = 1 << 18  # of a row: hundreds of parts are tokenised at a time
_MAX_LINE_BYTES = 64 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class Part(NamedTuple):
    """Consecutive text of one document: all of it, where it starts and ends here."""

    text: str
    starts: bool = True
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file to read, and the name that it keeps wherever its folder is moved to."""

    path: Path
    name: str

    @property
    def number(self) -> int:
        """A number of 64 bits that depends on the name alone."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass(frozen=True)
class Split:
    """One side of a source: the units that are held out, one in `every`, or all others."""

    heldout: bool
    every: int
    heldout_files: frozenset[TextFile] | None = None  # held out whole, and no others; None: by unit

    @property
    def name(self) -> str:
        return "heldout" if self.heldout else "train"

    def of_files(self, files: Iterable[TextFile]) -> Split:
        """This side, where whole files are held out: ceil(n / every) of n, at least one.

        They are those of the smallest numbers. A number depends on the file's name
        alone, so one file more or less moves at most one other to the other side.
        """
        ranked = sorted(set(files), key=lambda file: (file.number, file.name))
        held = frozenset(ranked[: math.ceil(len(ranked) / self.every)])
        return dataclasses.replace(self, heldout_files=held)

    def has(self, file: TextFile, unit: int) -> bool:
        """Whether a unit of a file, counted from 0, is on this side."""
        if self.heldout_files is not None:
            return (file in self.heldout_files) == self.heldout
        return ((file.number + unit) % self.every == 0) == self.heldout


def read_text(
    file: TextFile, split: Split, rejects: Rejects, *, block_bytes: int | None = None
) -> Iterator[Part]:
    """The parts of a text file on one side of the split.

    Args:
        file: the file.
        split: the side.
        rejects: told of documents and of lines that are not UTF-8, which are left out.
        block_bytes: about how long a unit is; consecutive units of one side are parts of one
            document. None: the file is one unit.
    """
    whole = block_bytes is None
    if whole and not split.has(file, 0):
        return
    blocks = functools.partial(_blocks, size=block_bytes or _BLOCK_BYTES)
    waiting: Part | None = None  # until it is known whether the document ends with it
    follows = False  # whether the block before was on this side
    for unit, (line, block) in enumerate(_readable(blocks, file, split, rejects, whole)):
        chosen = split.has(file, 0 if whole else unit)
        if waiting and not chosen:
            yield waiting._replace(ends=True)
            waiting = None
        text = _decode_lines(block, file, line, rejects) if chosen else ""
        if text:
            if waiting:
                yield waiting
            size = len(text.encode())
            if follows:
                rejects.more(size)
            else:
                rejects.document(size)
            waiting = Part(text, starts=not follows, ends=False)
        follows = chosen and (follows or bool(text))
    if waiting:
        yield waiting._replace(ends=True)


def read_jsonl(file: TextFile, split: Split, rejects: Rejects, *, field: str) -> Iterator[Part]:
    """The texts of a file of JSON objects, one a line, plain or with gzip, on one side of the split."""
    for number, line in _readable(_lines, file, split, rejects, False):
        if not split.has(file, number - 1):
            continue
        if line is None:
            rejects.reject(Defect.TOO_LONG, file.path, number, f"more than {_MAX_LINE_BYTES} bytes")
        elif line.strip():
            yield from _row(_parse_json, line, field, file, number, rejects)


def read_parquet(file: TextFile, split: Split, rejects: Rejects, *, field: str) -> Iterator[Part]:
    """The texts of one column of a parquet file, on one side of the split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.path) as table:
            if field not in table.schema_arrow.names:
                if split.has(file, 0):
                    has = ", ".join(table.schema_arrow.names[:10])
                    rejects.reject(
                        Defect.MISSING_FIELD, file.path, None, f"no column {field!r}; it has {has}"
                    )
                return
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if _is_text(column.type):
                    column = column.cast(pa.large_binary())  # invalid UTF-8 is found by us, row by row
                for value in column:
                    row += 1
                    if split.has(file, row - 1):
                        yield from _row(_parse_value, value.as_py(), field, file, row, rejects)
            if row == 0 and split.has(file, 0):
                rejects.reject(Defect.EMPTY, file.path, None, "the file has no rows")
    except (pa.ArrowException, OSError) as e:
        _reject_rest(file, row + 1, split, rejects, e)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    is_view = getattr(pa.types, "is_string_view", lambda _: False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_view(kind)


class _RowError(Exception):
    """A row that is not used: why, and what is wrong with it."""

    def __init__(self, defect: Defect, detail: str):
        super().__init__(detail)
        self.defect, self.detail = defect, detail


def _row(
    parse: Callable[[Any, str], str], value: Any, field: str, file: TextFile, number: int, rejects: Rejects
) -> Iterator[Part]:
    """The row's text as a document; nothing where the row is a reject."""
    try:
        text = parse(value, field)
        if not text:
            raise _RowError(Defect.EMPTY, f"{field!r} is an empty text")
        size = len(text.encode())
    except UnicodeError as e:
        rejects.reject(Defect.INVALID_UTF8, file.path, number, str(e))
    except _RowError as e:
        rejects.reject(e.defect, file.path, number, e.detail)
    else:
        rejects.document(size)
        for begin in range(0, len(text), _PART_CHARACTERS):
            end = begin + _PART_CHARACTERS
            yield Part(text[begin:end], starts=begin == 0, ends=end >= len(text))


def _parse_json(line: bytes, field: str) -> str:
    text = line.decode().strip()
    try:
        row = json.loads(text)
    except json.JSONDecodeError as e:
        raise _RowError(Defect.BROKEN_JSON, f"{e.msg}, column {e.colno}") from None
    except (ValueError, RecursionError) as e:
        raise _RowError(Defect.BROKEN_JSON, str(e)) from None
    if not isinstance(row, dict):
        raise _RowError(Defect.BROKEN_JSON, f"a {type(row).__name__}, where an object is expected")
    if field not in row:
        has = ", ".join(sorted(row)[:10]) or "nothing"
        raise _RowError(Defect.MISSING_FIELD, f"no field {field!r}; it has {has}")
    if not isinstance(row[field], str):
        raise _RowError(
            Defect.NOT_TEXT, f"{field!r} is a {type(row[field]).__name__}, where a string is expected"
        )
    return row[field]


def _parse_value(value: Any, field: str) -> str:
    if value is None:
        raise _RowError(Defect.MISSING_FIELD, f"{field!r} is null")
    if not isinstance(value, bytes):
        raise _RowError(Defect.NOT_TEXT, f"{field!r} is a {type(value).__name__}, where a string is expected")
    return value.decode()


def _readable[T](
    read: Callable[[io.BufferedIOBase], Iterator[tuple[int, T]]],
    file: TextFile,
    split: Split,
    rejects: Rejects,
    whole: bool,
) -> Iterator[tuple[int, T]]:
    """What `read` makes of an opened file; a file that is empty or breaks off is a reject."""
    place, count = 1, 0
    try:
        with gzip.open(file.path) if file.path.suffix == ".gz" else open(file.path, "rb") as stream:
            for place, item in read(stream):
                count += 1
                yield place, item
                place += 1
    except (OSError, EOFError, zlib.error) as e:
        _reject_rest(file, place, split, rejects, e, unit=0 if whole else count)
        return
    if not count and split.has(file, 0):
        rejects.reject(Defect.EMPTY, file.path, None, "the file has no text")


def _reject_rest(
    file: TextFile, place: int, split: Split, rejects: Rejects, error: Exception, unit: int | None = None
) -> None:
    if split.has(file, place - 1 if unit is None else unit):
        rejects.reject(Defect.DAMAGED, file.path, place, f"all from here on is not read: {error}")


def _lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes | None]]:
    """Lines, numbered from 1; None for one that is too long."""
    number = 0
    while line := stream.readline(_MAX_LINE_BYTES):
        number += 1
        if not line.endswith(b"\n") and len(line) == _MAX_LINE_BYTES:
            while (rest := stream.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _blocks(stream: io.BufferedIOBase, size: int) -> Iterator[tuple[int, bytes]]:
    """Blocks of about `size` bytes, each with the number of its first line, from 1.

    They are cut at the end of a line, or else between two characters.
    """
    number, rest = 1, stream.read(len(_BOM)).removeprefix(_BOM)
    while chunk := stream.read(size):
        data = rest + chunk
        cut = data.rfind(b"\n") + 1 or _character_end(data)
        if cut:
            yield number, data[:cut]
            number += data.count(b"\n", 0, cut)
        rest = data[cut:]
    if rest:
        yield number, rest


def _character_end(data: bytes) -> int:
    """Where the last character begins that may be cut off, at most 3 bytes before the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data) - back + 1
        if byte >= 0xC0:
            return len(data) - back
    return len(data)


def _decode_lines(block: bytes, file: TextFile, line: int, rejects: Rejects) -> str:
    """The block's text, less the lines that are not UTF-8."""
    try:
        return block.decode()
    except UnicodeDecodeError:
        pass
    kept = []
    for number, content in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", block), start=line):
        try:
            kept.append(content.decode())
        except UnicodeDecodeError as e:
            rejects.reject(Defect.INVALID_UTF8, file.path, number, str(e))
    return "".join(kept)
