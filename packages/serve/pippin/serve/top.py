"""The engine at a glance, drawn anew on the terminal twice a second: `server --top`."""

import collections
import statistics
import threading
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from pippin.serve.engine.engine import Load
from pippin.serve.engine.request import Output, Request, Timing

_WINDOW_S = 10.0
_EVERY_S = 0.5
_MOST = 100_000  # events that are kept, whether or not anybody looks
_WIDTH = 40  # of a bar


class Top:
    """What happened lately (`Observer`), and its picture."""

    def __init__(self, name: str, max_requests: int, load: Callable[[], Load], clock: Callable[[], float]):
        self._name, self._max_requests, self._load, self._clock = name, max_requests, load, clock
        self._lock = threading.Lock()
        self._steps: collections.deque[tuple[float, float, float]] = collections.deque(
            maxlen=_MOST
        )  # when, tokens, seconds
        self._tokens: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=_MOST
        )  # when, seconds since the last
        self._first: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=_MOST
        )  # when, seconds since arrival
        self._ended: collections.Counter[str] = collections.Counter()  # finish reason -> requests
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, console: Console | None = None) -> None:
        """Draws from now on."""
        self._thread = threading.Thread(
            target=self._draw, args=(console or Console(stderr=True),), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Draws the last time."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def on_finish(self, request: Request, output: Output, timing: Timing) -> None:
        """See `Observer`."""
        assert output.finish_reason is not None, "the last output"
        with self._lock:
            self._ended[output.finish_reason.value] += 1

    def on_step(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """See `Observer`."""
        with self._lock:
            self._steps.append((self._clock(), num_tokens, seconds))

    def on_tokens(self, seconds: Sequence[float]) -> None:
        """See `Observer`."""
        now = self._clock()
        with self._lock:
            self._tokens.extend((now, gap) for gap in seconds)

    def on_first_token(self, request: Request, seconds: float) -> None:
        """See `Observer`."""
        with self._lock:
            self._first.append((self._clock(), seconds))

    def picture(self) -> RenderableType:
        """What is drawn."""
        load, since = self._load(), self._clock() - _WINDOW_S
        with self._lock:
            for queue in (self._steps, self._tokens, self._first):
                while queue and queue[0][0] < since:
                    queue.popleft()
            steps = [seconds for _, _, seconds in self._steps]
            computed = sum(tokens for _, tokens, _ in self._steps) / _WINDOW_S
            written = (len(self._tokens) + len(self._first)) / _WINDOW_S
            gaps, first = [s for _, s in self._tokens], [s for _, s in self._first]
            ended = ", ".join(f"{count} {reason}" for reason, count in sorted(self._ended.items()))
        table = Table(box=box.SIMPLE, show_header=False, title=f"{self._name} ({_state(load)})")
        table.add_row("running", str(load.num_running), _bar(load.num_running, self._max_requests))
        table.add_row("waiting", str(load.num_waiting), f"{load.waiting_tokens:,} tokens")
        table.add_row(
            "pages", f"{load.used_pages} of {load.num_pages}", _bar(load.used_pages, load.num_pages)
        )
        table.add_row("output", f"{written:.1f} tokens/s", f"{computed:.1f} computed")
        table.add_row("first token", _milliseconds(first), "from arrival: median, 99 of 100")
        table.add_row("between tokens", _milliseconds(gaps), "median, 99 of 100")
        table.add_row("step", _milliseconds(steps), f"{load.steps:,} so far")
        hits = load.prefix_hits / load.prefix_queries if load.prefix_queries else 0.0
        table.add_row("known prefixes", f"{hits:.0%}", f"of {load.prefix_queries:,} tokens")
        right = load.right_drafts / load.drafts if load.drafts else 0.0
        table.add_row("right guesses", f"{right:.0%}", f"of {load.drafts:,} tokens")
        table.add_row("gave up turns", str(load.preemptions), "")
        table.add_row("ended", str(sum(self._ended.values())), ended)
        return table

    def _draw(self, console: Console) -> None:
        with Live(self.picture(), console=console, auto_refresh=False) as live:
            while not self._stopped.wait(_EVERY_S):
                live.update(self.picture(), refresh=True)
            live.update(self.picture(), refresh=True)


def _state(load: Load) -> str:
    return "stalled" if load.stalled else "draining" if load.draining else "ready"


def _bar(value: int, most: int) -> ProgressBar:
    return ProgressBar(total=most, completed=value, width=_WIDTH)


def _milliseconds(seconds: Sequence[float]) -> str:
    """The median and the 99th percentile."""
    if not seconds:
        return "-"
    highest = statistics.quantiles(seconds, n=100, method="inclusive")[98] if len(seconds) > 1 else seconds[0]
    return f"{1000 * statistics.median(seconds):.0f}, {1000 * highest:.0f} ms"
