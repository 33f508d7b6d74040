"""The endless order of samples: which task each row comes from, and which of its rows.

The order depends on the rates, the names of the tasks, the seed and the stores,
never on the number of processes, and its state is a few numbers.

Tasks take turns so that each is as near to its rate as whole rows allow. The
rows of a task are shuffled anew in each epoch: in the first within a shard, so
that training starts when one shard is packed; from the second on, all of them.

(seqio's Mixture draws tasks at random, from a state that cannot be saved, and
draws anew on each process.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from pippin.core.errors import DataError
from pippin.train.input.store import StoreReader


@dataclasses.dataclass
class Place:
    """How far a task has come: the next row is `position` of `epoch`, after `drawn` rows."""

    epoch: int = 0
    position: int = 0
    drawn: int = 0


class TaskOrder:
    """The rows of one store, epoch after epoch, from a place on."""

    def __init__(self, name: str, store: StoreReader, seed: int, place: Place):
        self.name, self.store, self.place = name, store, place
        self._seed = seed
        self._shuffled: tuple[tuple[int, int], np.ndarray] | None = None  # (epoch, shard) -> order of rows

    def next_row(self) -> int:
        """The number of the next row, which is there when this returns.

        Raises:
            DataError: the task has no rows.
        """
        row = self._at(self.place.epoch, self.place.position)
        if row is None:
            if self.place.position == 0:
                raise DataError(
                    f"task {self.name!r} has no text to train on: {self.store.completed().report.text()}. "
                    "Give it more text, or mend what was rejected."
                )
            self.place.epoch, self.place.position = self.place.epoch + 1, 0
            row = self._at(self.place.epoch, 0)
            assert row is not None
        self.place.position += 1
        self.place.drawn += 1
        return row

    def _at(self, epoch: int, position: int) -> int | None:
        """The row at a position of an epoch; None behind its end."""
        if epoch:
            rows = self.store.completed().rows
            return int(self._order(epoch, 0, rows)[position]) if position < rows else None
        size = self.store.shard_size()
        shard, place = divmod(position, size)
        rows = self.store.shard_rows(shard)
        return shard * size + int(self._order(0, shard, rows)[place]) if place < rows else None

    def _order(self, epoch: int, shard: int, rows: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != (epoch, shard):
            key = blake2b(f"{self.name} {self._seed} {epoch} {shard}".encode(), digest_size=16).digest()
            # RandomState, as its stream is the same in every release of NumPy.
            random = np.random.RandomState(np.frombuffer(key, np.uint32))
            self._shuffled = ((epoch, shard), random.permutation(rows))
        return self._shuffled[1]


class SampleOrder:
    """The rows of a mixture, one after the other."""

    def __init__(self, tasks: Sequence[TaskOrder], rates: Sequence[float]):
        self.tasks = tasks
        self._shares = np.asarray(rates, np.float64) / np.sum(rates)

    def next_sample(self) -> tuple[StoreReader, int]:
        """The store and the number of the next row."""
        drawn = np.asarray([task.place.drawn for task in self.tasks], np.float64)
        task = self.tasks[int(np.argmax(self._shares * (drawn.sum() + 1) - drawn))]
        return task.store, task.next_row()
