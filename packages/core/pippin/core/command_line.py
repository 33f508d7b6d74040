"""What commands have in common: they run where the user typed them, and tell mistakes in a line. Quick to import."""

import os
import sys
from collections.abc import Callable

from pippin.core.errors import PippinError

USER_ERROR = 2
INTERRUPTED = 130


def run_command(run: Callable[[], int]) -> int:
    """What a command returns as its exit code: that of `run`, or USER_ERROR where the user can put right what is wrong.

    Args:
        run: does it; paths are relative to where the user typed.
    """
    # `bazel run` starts programs elsewhere.
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    try:
        return run()
    except PippinError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER_ERROR
    except OSError as e:
        print(f"error: {e}. Check the path, the permissions and the room on the disk.", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
