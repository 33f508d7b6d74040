"""The command `bazel run //packages/export:coreai`, and `pippin-coreai`: a model as a program for Core AI."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pippin.core.errors import PippinError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    # `bazel run` starts programs elsewhere; paths are relative to where the user typed.
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    from pippin.export.export_coreai import Options, export_coreai

    try:
        options = Options(
            context_length=args.context,
            prefill_length=args.prefill,
            precision=args.precision,
            recipe=args.recipe,
            check_steps=args.check,
        )
        summary = export_coreai(args.model, args.out, options)
    except PippinError as error:
        print(f"coreai: {error}", file=sys.stderr)
        return 2
    print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coreai",
        description="Writes a model as an .aimodel for Core AI of iOS 27 and macOS 27, with its tokenizer beside it.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a training run, one of its steps, a bundle (compressed ones too), a Hugging Face folder or GGUF file of the "
        "Llama family, or the name of a fetched model",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="X.aimodel", help="a new program")
    parser.add_argument(
        "--recipe", default="", help="compresses the weights, as //packages/export:compress does"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=512,
        help="tokens that the caches hold, a multiple of 32 (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill",
        type=int,
        default=64,
        help="tokens of a prompt that are read at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="float16",
        help="what is computed in: float16, as Apple's devices do best, or float32, which is faster on Linux by far "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        type=int,
        default=0,
        metavar="STEPS",
        help="runs what was saved for so many greedy tokens beside the model in JAX, and tells how far they are apart",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
