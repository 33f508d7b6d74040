"""The command `bazel run //packages/train:jobs`, and `pippin-jobs`: how submitted jobs are, their logs, and their end.

The exit code of `status` is 0 for a job that waits, runs or is done; else that of its end, as launch's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pippin.core.command_line import run_command
from pippin.train.cluster.options import CLUSTERS, make_backend


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jobs", description="Looks after jobs that launch submitted.")
    parser.add_argument("action", choices=("status", "logs", "cancel"))
    parser.add_argument("name", help="the job's, as launch submitted it")
    parser.add_argument("--backend", choices=CLUSTERS, required=True)
    parser.add_argument("--process", type=int, default=0, metavar="I", help="whose logs (default: 0)")
    parser.add_argument("--namespace", default="default", help="Kubernetes' (jobset)")
    parser.add_argument("--address", help="of Ray's dashboard, http://HOST:8265 (ray)")
    return parser


def _run(args: argparse.Namespace) -> int:
    backend = make_backend(args.backend, args.namespace, args.address)
    if args.action == "logs":
        print(backend.logs(args.name, args.process), end="")
        return 0
    if args.action == "cancel":
        print(backend.cancel(args.name))
        return 0
    status = backend.status(args.name)
    print(status.text(args.name))
    return status.outcome.exit_code if status.outcome else 0


if __name__ == "__main__":
    sys.exit(main())
