"""Items made ahead of time in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator


class Prefetch[T]:
    """An iterator over `items`, of which up to `size` are ready before they are asked for.

    An error of `items` is raised by `next`, after the items before it.
    """

    def __init__(self, items: Iterator[T], size: int):
        self._items = items
        self._ready: queue.Queue[T | _Failure] = queue.Queue(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="prefetch")
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, _Failure):
            self._put(item)  # for whoever asks again
            raise item.error
        return item

    def close(self) -> None:
        """Stops making items, and waits for the one in work, though not for long."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_Failure(StopIteration()))
        except BaseException as e:  # noqa: BLE001  raised again by `next`
            self._put(_Failure(e))

    def _put(self, item: T | _Failure) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False


class _Failure:
    """What ended the items."""

    def __init__(self, error: BaseException):
        self.error = error
