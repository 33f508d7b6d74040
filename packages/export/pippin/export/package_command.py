"""What the commands that write packages have in common: their options, and how they run. Quick to import."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pippin.core.command_line import run_command
from pippin.export.compress.recipes import DEFAULT_RECIPE, NO_RECIPE


def package_parser(prog: str, description: str, suffix: str) -> argparse.ArgumentParser:
    """The options that every kind of package has.

    Args:
        prog: the name of the command.
        description: what it does, in a sentence.
        suffix: of its packages.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a training run, one of its steps, a bundle (compressed ones too), a Hugging Face folder or GGUF file of the "
        "Llama family, or the name of a fetched model",
    )
    parser.add_argument("--out", required=True, type=Path, metavar=f"X{suffix}", help="a new package")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="compresses the weights: one of the recipes that `bazel run //packages/export:compress -- --list` lists, or "
        f"{NO_RECIPE} to store them as they are, floats as float16 (default: {DEFAULT_RECIPE} of floats; what was compressed, "
        "or trained with rounded weights, as it is)",
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


def package_options(args: argparse.Namespace) -> dict[str, Any]:
    """What these options come to: the fields of `export_package.Options`."""
    return {
        "context_length": args.context,
        "prefill_length": args.prefill,
        "adapter_rank": args.adapter_rank,
        "adapters": tuple(args.adapter),
        "recipe": args.recipe,
        "perplexity_tokens": args.perplexity_tokens,
        "verify_steps": args.verify_steps,
    }


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    export: Callable[[argparse.Namespace], str],
) -> int:
    """Runs a command; returns its exit code. What `export` returns of the arguments is printed."""
    args = parser.parse_args(argv)

    def told() -> int:
        print(export(args))
        return 0

    return run_command(told)
