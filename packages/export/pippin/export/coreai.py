"""The command `bazel run //packages/export:coreai`, and `pippin-coreai`: a model as a program for Core AI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pippin.export.package_command import package_options, package_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = package_parser(
        prog="coreai",
        description="Writes a model as an .aimodel for Core AI of iOS 27 and macOS 27, with its tokenizer and a report beside it.",
        suffix=".aimodel",
    )
    parser.add_argument(
        "--precision",
        default="float16",
        help="what is computed in: float16, as Apple's devices do best, or float32, which Linux computes faster by far; "
        "--verify-steps runs a program of float16 for two tokens only, and the same in float32 (default: %(default)s)",
    )
    return run(parser, argv, _export)


def _export(args: argparse.Namespace) -> str:
    from pippin.export.export_coreai import CoreAIOptions, export_coreai

    options = CoreAIOptions(**package_options(args), precision=args.precision)
    return export_coreai(args.model, args.out, options)


if __name__ == "__main__":
    sys.exit(main())
