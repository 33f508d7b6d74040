"""The command `bazel run //packages/export:coreml`, and `pippin-coreml`: a model as a package for Core ML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pippin.export.package_command import package_options, package_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = package_parser(
        prog="coreml",
        description="Writes a model as an .mlpackage for iOS 18 and macOS 15, with its tokenizer and a report beside it.",
        suffix=".mlpackage",
    )
    return run(parser, argv, _export)


def _export(args: argparse.Namespace) -> str:
    from pippin.export.export_coreml import Options, export_coreml

    return export_coreml(args.model, args.out, Options(**package_options(args)))


if __name__ == "__main__":
    sys.exit(main())
