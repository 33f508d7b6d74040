"""Packed rows on disk: written once, in shards, and read while later shards are still being written.

A store is a directory: `00000.npy`, ... of [rows, 3, T] each, and `index.json`,
which is written anew after each shard and says how many there are. All shards
but the last have the same number of rows. 2-byte integers where the vocabulary
allows it, so a token takes 6 bytes, or else 12.

Reading row i is one look into a memory-mapped file, which is what makes it cheap
to restore the exact sample in the middle of an epoch. Skipping through a stream
of text would take as long as training did.
"""

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from pippin.core.atomic_file import write_atomic
from pippin.core.errors import DataError
from pippin.train.input.rejects import ReadReport

_SHARD_TOKENS = 1 << 20  # what must be packed before the first row can be read
_INDEX = "index.json"
_OPEN_SHARDS = 4096  # a process may have some 65,000 files mapped
_POLL_S = 0.02


@dataclasses.dataclass(frozen=True)
class StoreIndex:
    """What a store has so far."""

    complete: bool
    shards: int
    shard_rows: int  # of all shards but the last
    rows: int
    tokens: int  # targets; the rest of the rows is padding
    report: ReadReport

    def padding(self, sequence_length: int) -> float:
        """The share of the rows that is padding."""
        return 1 - self.tokens / (self.rows * sequence_length) if self.rows else 0.0


class StoreWriter:
    """Writes rows of `sequence_length` tokens, ids below `vocab_size`, into a directory."""

    def __init__(self, directory: Path, sequence_length: int, vocab_size: int):
        self._directory = directory
        self._dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._shard_rows = max(1, _SHARD_TOKENS // sequence_length)
        self._buffer: list[np.ndarray] = []
        self._shards = self._tokens = 0
        self.rows = 0

    def add(self, row: Integer[np.ndarray, "3 T"], report: ReadReport) -> bool:
        """Takes a row [3, T]; whether it completed a shard, which can be read from now on."""
        self._buffer.append(row.astype(self._dtype))
        self.rows += 1
        self._tokens += int(np.count_nonzero(row[2]))
        if len(self._buffer) < self._shard_rows:
            return False
        self._write_shard()
        self._write_index(report, complete=False)
        return True

    def finish(self, report: ReadReport) -> None:
        """Writes what is left; no row follows."""
        if self._buffer:
            self._write_shard()
        self._write_index(report, complete=True)

    def _write_shard(self) -> None:
        content = io.BytesIO()
        np.save(content, np.stack(self._buffer), allow_pickle=False)
        write_atomic(_shard_path(self._directory, self._shards), content.getvalue())
        self._shards += 1
        self._buffer.clear()

    def _write_index(self, report: ReadReport, complete: bool) -> None:
        index = StoreIndex(complete, self._shards, self._shard_rows, self.rows, self._tokens, report)
        write_atomic(self._directory / _INDEX, json.dumps(dataclasses.asdict(index)).encode())


class StoreReader:
    """Reads the rows of a store, and waits for those that are still to be written.

    Args:
        directory: the store's.
        waiting: called again and again while a row is not there yet; it raises to give up.
    """

    def __init__(self, directory: Path, waiting: Callable[[], None]):
        self.directory = directory
        self._waiting = waiting
        self._index: StoreIndex | None = None
        self._shards: dict[int, np.ndarray] = {}  # number -> memory-mapped rows

    def peek(self) -> StoreIndex | None:
        """What the store has by now; None if it has nothing yet."""
        if self._index is None or not self._index.complete:
            self._index = read_index(self.directory)
        return self._index

    def completed(self) -> StoreIndex:
        """The index, when nothing more follows."""
        return self._wait_until(lambda index: index.complete)

    def shard_size(self) -> int:
        """How many rows each shard has but the last."""
        return self._wait_until(lambda index: True).shard_rows

    def shard_rows(self, shard: int) -> int:
        """How many rows a shard has; 0 for one behind the end."""
        index = self._wait_until(lambda index: index.complete or shard < index.shards)
        return max(0, min(index.shard_rows, index.rows - shard * index.shard_rows))

    def row(self, number: int) -> Integer[np.ndarray, "3 T"]:
        """Row `number` [3, T] of those that are there."""
        shard, place = divmod(number, self.shard_size())
        return self._shard(shard)[place]

    def shards(self, most: int) -> Iterator[Integer[np.ndarray, "rows 3 T"]]:
        """The rows of each of the first shards [rows, 3, T] that are there by now."""
        index = self.peek()
        for shard in range(min(most, index.shards if index else 0)):
            yield self._shard(shard)

    def _shard(self, shard: int) -> np.ndarray:
        rows = self._shards.get(shard)
        if rows is None:
            if len(self._shards) == _OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]
            rows = self._shards[shard] = self._map(shard)
        return rows

    def _map(self, shard: int) -> np.ndarray:
        path = _shard_path(self.directory, shard)
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(
                f"{path}, packed text in the cache, cannot be read: {e}. Remove {self.directory}; it is made again."
            ) from e
        if len(rows) != self.shard_rows(shard):
            raise DataError(
                f"{path}, packed text in the cache, has {len(rows)} rows where {self.shard_rows(shard)} were "
                f"written. Remove {self.directory}; it is made again."
            )
        return rows

    def _wait_until(self, ready: Callable[[StoreIndex], bool]) -> StoreIndex:
        index = self._index
        while index is None or not ready(index):
            index = self.peek()
            if index is None or not ready(index):
                self._waiting()
                time.sleep(_POLL_S)
        return index


def read_index(directory: Path) -> StoreIndex | None:
    """The index of a store; None where there is none yet.

    Raises:
        DataError: it is damaged.
    """
    try:
        value = json.loads((directory / _INDEX).read_bytes())
        return StoreIndex(**{**value, "report": ReadReport.from_json(value["report"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{directory / _INDEX}, in the cache, is damaged: {e!r}. Remove {directory}; it is made again."
        ) from e


def _shard_path(directory: Path, shard: int) -> Path:
    return directory / f"{shard:05}.npy"
