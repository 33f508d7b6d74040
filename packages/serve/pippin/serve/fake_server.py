"""The server's program with a model whose every answer is known: `fake_server STEP_S [flags]`."""

import sys
import time

from pippin.serve.engine.scheduler import Limits
from pippin.serve.engine.testing import FakeRunner
from pippin.serve.options import Options
from pippin.serve.server import Backend, run
from pippin.serve.testing import fake_backend


class SlowRunner(FakeRunner):
    """Takes a while for each step."""

    def __init__(self, limits: Limits, step_s: float):
        super().__init__(limits)
        self._step_s = step_s

    def run(self, rows):
        time.sleep(self._step_s)
        return super().run(rows)


def open_backend(options: Options) -> Backend:
    """The backend of the flags."""
    return fake_backend(make_runner=lambda limits: SlowRunner(limits, float(sys.argv[1]))).backend


if __name__ == "__main__":
    sys.exit(run(open_backend, sys.argv[2:]))
