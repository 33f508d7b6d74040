"""A file whose content may change while the server runs: tokens, certificates."""

import logging
import pathlib
import threading
import time
from collections.abc import Callable

from pippin.core.errors import PippinError

_log = logging.getLogger(__name__)

_CHECK_S = 1.0  # between looks at the file's time


class WatchedFiles[T]:
    """What some files hold, read anew after they changed.

    New content that cannot be read is logged, and the old stays until the files change again: half-written files
    do no harm. For any thread.
    """

    def __init__(
        self,
        paths: list[pathlib.Path],
        read: Callable[[list[pathlib.Path]], T],
        clock: Callable[[], float] = time.monotonic,
    ):
        """Reads for the first time; raises what `read` raises."""
        self._paths, self._read, self._clock = paths, read, clock
        self._lock = threading.Lock()
        self._checked = clock()
        self._stamp = self._look()
        self._value = read(paths)

    @property
    def value(self) -> T:
        """What they hold, as of a second ago."""
        with self._lock:
            now = self._clock()
            if now - self._checked >= _CHECK_S:
                self._checked = now
                self._refresh()
            return self._value

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._value = self._read(self._paths)
        except (OSError, PippinError) as error:
            _log.error("%s could not be read anew, what it held stays: %s", self._paths[0], error)
        else:
            _log.info("%s was read anew", ", ".join(map(str, self._paths)))

    def _look(self) -> list[tuple[int, int, int] | None]:
        stamps = []
        for path in self._paths:
            try:
                found = path.stat()
                stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
            except OSError:
                stamps.append(None)
        return stamps
