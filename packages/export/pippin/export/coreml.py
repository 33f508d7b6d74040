"""The command `bazel run //packages/export:coreml`, and `pippin-coreml`: a model as a package for Core ML."""

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
    from pippin.export.export_coreml import Options, export_coreml

    try:
        if args.adapter and not args.adapter_rank:
            args.adapter_rank = _largest_rank(args.adapter)
        options = Options(
            context_length=args.context,
            prefill_length=args.prefill,
            adapter_rank=args.adapter_rank,
            adapters=tuple(args.adapter),
            recipe=args.recipe,
            perplexity_tokens=args.perplexity_tokens,
            verify_steps=args.verify_steps,
        )
        summary = export_coreml(args.model, args.out, options)
    except PippinError as error:
        print(f"coreml: {error}", file=sys.stderr)
        return 2
    print(summary)
    return 0


def _largest_rank(directories: Sequence[Path]) -> int:
    from pippin.core.adapter import load_adapter

    return max(load_adapter(directory).rank for directory in directories)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coreml",
        description="Writes a model as an .mlpackage for iOS 18 and macOS 15, with its tokenizer and a report beside it.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a training run, one of its steps, a bundle (compressed ones too), a Hugging Face folder or GGUF file of the "
        "Llama family, or the name of a fetched model",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="X.mlpackage", help="a new package")
    parser.add_argument(
        "--recipe",
        default="",
        metavar="NAME",
        help="compresses the weights: one of the recipes that `bazel run //packages/export:compress -- --list` lists "
        "(default: float16, or as the bundle is compressed)",
    )
    parser.add_argument(
        "--perplexity-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="measures perplexity, before and after, on so many tokens; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--verify-steps",
        type=int,
        default=8,
        metavar="N",
        help="runs the saved package beside the model for a prompt and N tokens; 0 for not at all (default: %(default)s)",
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
        "--adapter-rank",
        type=int,
        default=0,
        metavar="R",
        help="makes room for adapters of at most this rank (default: none, or that of --adapter)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="an adapter of this model, which is written beside the package; may be given again",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
