"""Where the time of a run went: every second is in one bucket, and the buckets add up to the wall time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pippin.v1 import job_pb2 as pb

Bucket = pb.GoodputBucket


class Ledger:
    """A stopwatch that is always in one bucket; `into` changes it for a block.

    Blocks nest: an inner block's time is not counted in the outer one.
    """

    def __init__(self, started: float | None = None):
        """
        Args:
            started: `time.monotonic()` at the start of the process; by default, now.
        """
        self._since = self._started = time.monotonic() if started is None else started
        self._current = Bucket.GOODPUT_BUCKET_INIT
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    @contextlib.contextmanager
    def into(self, bucket: int) -> Iterator[None]:
        """Counts the time of the block in a bucket."""
        outer = self._switch(bucket)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        try:
            yield
        finally:
            self._switch(outer)

    def rest_into(self, bucket: int) -> None:
        """Counts all time outside of blocks in a bucket, from now on."""
        self._switch(bucket)

    def seconds(self, bucket: int) -> float:
        """What a bucket has so far, in seconds."""
        running = time.monotonic() - self._since if bucket == self._current else 0.0
        return self._seconds.get(bucket, 0.0) + running

    def message(self) -> pb.GoodputLedger:
        """The ledger up to now."""
        self._switch(self._current)
        message = pb.GoodputLedger(wall_seconds=self._since - self._started)
        for bucket in sorted(self._seconds):
            message.entries.add(
                bucket=bucket, seconds=self._seconds[bucket], count=self._counts.get(bucket, 0)
            )
        return message

    def _switch(self, bucket: int) -> int:
        now = time.monotonic()
        self._seconds[self._current] = self._seconds.get(self._current, 0.0) + now - self._since
        self._since = now
        outer, self._current = self._current, bucket
        return outer
