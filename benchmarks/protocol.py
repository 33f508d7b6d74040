"""How a benchmark talks to a contender: a process of its own that trains when it is told to.

The contender writes one line of JSON when it is ready, reads a number of steps
a line, does them, and writes one line of JSON with `seconds` for each. Standard
library alone: contenders run in other environments.
"""

import json
import resource
import sys
import time


def serve(start):
    """Runs a contender in this process until its standard input ends.

    Args:
        start: returns `(train, facts)`: `train(n)` does n steps and returns the last loss,
            and `facts` are to be reported once.
    """
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not mix with the protocol
    began = time.monotonic()
    train, facts = start()
    first_loss = train(1)
    print(
        json.dumps({**facts, "first_step_s": time.monotonic() - began, "first_loss": first_loss}),
        file=out,
        flush=True,
    )
    for line in sys.stdin:
        began = time.monotonic()
        loss = train(int(line))
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}), file=out, flush=True)
