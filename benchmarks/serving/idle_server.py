"""Our server's program without a model: what it computes is the work of gRPC, of the scheduler and of the engine.

python -m benchmarks.serving.idle_server [flags of the server]
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence

from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.engine.request import Sampled
from pippin.serve.engine.scheduler import Limits, Row
from pippin.serve.options import Options
from pippin.serve.served_model import ServedModel
from pippin.serve.server import Backend, run

_VOCAB_SIZE = 49_152
_CONTEXT = 2048
_NUM_PAGES = 1456  # what 1 GiB holds of SmolLM2-135M


# A step sleeps: without that, the tokens of many steps would go into one message.
_STEP_S = 0.005


class IdleRunner:
    """Tokens from a list, whatever the rows are, too random to be guessed. Their steps take time and compute nothing."""

    def __init__(self) -> None:
        source = random.Random(0)
        self._tokens = [Sampled(source.randrange(1000, _VOCAB_SIZE)) for _ in range(4093)]
        self._next = 0

    def run(self, rows: Sequence[Row]) -> list[list[Sampled]]:
        """See `Runner`."""
        time.sleep(_STEP_S)
        return [[self._token() for _ in range(1 + len(row.drafts))] if row.sampling else [] for row in rows]

    def reset(self) -> None:
        """There is no cache."""

    def _token(self) -> Sampled:
        self._next = (self._next + 1) % len(self._tokens)
        return self._tokens[self._next]


def open_backend(options: Options) -> Backend:
    """An engine without a model."""
    limits = Limits(num_pages=_NUM_PAGES, longest=_CONTEXT, max_requests=options.max_requests)
    model = ServedModel(name="idle", vocab_size=_VOCAB_SIZE, context_length=_CONTEXT)
    queue = QueueLimits(max_waiting=options.max_waiting)
    return Backend(Engine(IdleRunner(), limits, lambda token: b"x", queue=queue), model)


if __name__ == "__main__":
    sys.exit(run(open_backend))
