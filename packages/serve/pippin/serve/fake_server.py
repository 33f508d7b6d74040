"""The server's program with a model whose every answer is known: `fake_server STEP_S [flags]`."""

import sys

from pippin.serve.backend import Backend
from pippin.serve.options import Options
from pippin.serve.server import run
from pippin.serve.testing import SlowRunner, fake_backend


def open_backend(_: Options) -> Backend:
    """The backend, whatever the flags."""
    return fake_backend(make_runner=lambda limits: SlowRunner(limits, float(sys.argv[1]))).backend


if __name__ == "__main__":
    sys.exit(run(open_backend, sys.argv[2:]))
