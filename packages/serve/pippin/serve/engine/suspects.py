"""Which requests made a step fail: halves of those it computed are computed apart, until one is left."""

import collections
from collections.abc import Sequence


class Suspects:
    """Requests of a step that failed, in groups. Only the first group's are computed, until none is left in it.

    Of n requests, k that make each of their steps fail are found in O(k log n) steps that fail.
    """

    def __init__(self) -> None:
        self._groups: collections.deque[list[str]] = collections.deque()

    @property
    def group(self) -> Sequence[str] | None:
        """The ids of those that are to be computed without others; None: nobody is suspected."""
        return self._groups[0] if self._groups else None

    def split(self, failed: Sequence[str]) -> None:
        """After a step of these requests, at least one, failed: each half of them is a group."""
        for request_id in failed:
            self.remove(request_id)
        middle = len(failed) // 2
        for half in (failed[middle:], failed[:middle]):
            if half:
                self._groups.appendleft(list(half))

    def remove(self, request_id: str) -> None:
        """A request got its next token, or ended: it is suspected no more."""
        for group in self._groups:
            if request_id in group:
                group.remove(request_id)
        while self._groups and not self._groups[0]:
            self._groups.popleft()

    def clear(self) -> None:
        """Nobody is suspected."""
        self._groups.clear()
