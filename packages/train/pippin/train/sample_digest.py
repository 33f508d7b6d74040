"""A digest of all samples that a run has trained on, the same however many processes read them."""

import hashlib

import numpy as np

from pippin.core import processes
from pippin.core.batch import Batch
from pippin.train.cluster.share import Share

_BYTES = 32


class SampleDigest:
    """The sum over all rows of the SHA-256 of the row, its step and its place in the batch.

    A sum, so that each process adds up the rows that it reads, and they add up their sums when one is asked for.
    """

    def __init__(self, before: bytes = b"", share: Share | None = None):
        """
        Args:
            before: what `total` gave of the samples so far.
            share: the part of each batch that this process reads; None: all of it.
        """
        self.share = share or Share()
        self._sum = int.from_bytes(before) if processes.is_first() else 0

    def add(self, step: int, batch: Batch) -> None:
        """Adds this process's rows of a step's batch."""
        if not self.share.counts:
            return
        fields = [np.ascontiguousarray(batch[name]) for name in sorted(batch)]  # type: ignore[literal-required]
        first = self.share.index * len(fields[0])
        for i in range(len(fields[0])):
            row = hashlib.sha256(step.to_bytes(8) + (first + i).to_bytes(8))
            for field in fields:
                row.update(field[i].tobytes())
            self._sum = (self._sum + int.from_bytes(row.digest())) % 2 ** (8 * _BYTES)

    def total(self) -> bytes:
        """The digest over all processes, which ask for it together."""
        everyone = processes.gather(self._sum.to_bytes(_BYTES))
        return (sum(map(int.from_bytes, everyone)) % 2 ** (8 * _BYTES)).to_bytes(_BYTES)
