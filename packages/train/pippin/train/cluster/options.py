"""The part of launch's command line that says where a job runs, apart from what it trains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to launch's."""
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "-n",
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="train with so many processes on this machine",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often to start again where a process was lost (default: 0)",
    )


def job_arguments(argv: Sequence[str]) -> list[str]:
    """What of a command line each process of the job gets: all but these options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    return parser.parse_known_args(list(argv))[1]
