"""The command `bazel run //packages/export:verify`, and `pippin-verify`: a saved package against the model that it is of."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pippin.core.command_line import run_command

_OK, _FAILED = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if all checks passed, 1 if one failed, and 2 if it could not be asked."""
    args = _parser().parse_args(argv)
    # Before NumPy is imported. Its threads wait for each other by spinning: on a busy machine that takes five times as
    # long; and sums of one thread are the same on every machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from pippin.core.manifest import DamageError
    from pippin.export.verify_package import Request, verify_package

    request = Request(
        package=args.package,
        model=args.model,
        float_model=args.float_model,
        steps=args.steps,
        mode=args.mode,
        perplexity_tokens=args.perplexity,
        text=args.text,
        record=args.record,
        adapter=args.adapter,
    )
    try:
        report = verify_package(request)
    except DamageError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return _FAILED
    print(report.text)
    return _OK if report.passed else _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verify",
        description="Runs the program of a saved .mlpackage or .aimodel, its states included, and holds it against its model in JAX.",
        epilog="exit code: 0 all checks passed, 1 one failed, 2 wrong arguments",
    )
    parser.add_argument(
        "package", type=Path, metavar="PACKAGE", help="X.mlpackage or X.aimodel, with the folder X beside it"
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="that was exported: what //packages/export:coreml or :coreai was given, or X/compressed",
    )
    parser.add_argument(
        "--steps", type=int, default=32, help="tokens that are decoded (default: %(default)s)"
    )
    parser.add_argument(
        "--mode",
        choices=("float16", "exact", "both"),
        default="both",
        help="of .mlpackages: float16 rounds after every operation, as the package declares; exact computes in float64 between them "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--perplexity",
        type=int,
        nargs="?",
        const=512,
        default=0,
        metavar="TOKENS",
        help="measures the perplexity of the package and of the float model over this many tokens (512 if not said)",
    )
    parser.add_argument(
        "--float-model",
        default="",
        metavar="MODEL",
        help="before it was compressed, to which --perplexity compares (default: --model)",
    )
    parser.add_argument(
        "--text", type=Path, help="a file of text to verify with (default: Python's documentation)"
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="writes what was measured of an .mlpackage into its manifest, and golden vectors for a check on a Mac beside it; with --adapter "
        "the vectors alone, of that adapter",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FILE",
        help="an adapter beside the package, X/adapters/NAME.bin: the model in JAX gets it into its weights",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
