"""The command `bazel run //packages/train:compile`: what a recipe's training step will be on hardware that is not here.

Compiles the true step for the true topology with the compiler of that hardware: libtpu for TPUs; XLA and cuDNN for
NVIDIA GPUs, which are 4.9 GB, so that `bazel run //packages/train:compile_gpu` is the same command with them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pippin.core.command_line import run_command
from pippin.layers import configs as _layers  # noqa: F401  so that --set knows every layer by its name
from pippin.train.launch import choose_recipe, configure
from pippin.train.recipe import load_file

_EPILOG = """
Examples:

  compile --recipe afm_on_device_2024_core --target tpu-v5p-512
  compile --recipe llama2_7b --target tpu-v5e-256 --target tpu-v5e-256x4 --out report.html    # one slice; four
  compile_gpu --recipe llama2_7b --target gpu-h100-256 --target tpu-v5p-512
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for a mistake of the user's, 1 if a step does not fit."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the arrays that a build needs live here
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compile",
        description="Compiles a recipe's training step for TPUs or GPUs that are not here, and says what it will be.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", help="whose step to compile")
    parser.add_argument(
        "--recipe-file", type=Path, metavar="FILE", help="a Python file of your own with an @recipe"
    )
    parser.add_argument(
        "--target", action="append", required=True, metavar="NAME", help="such as tpu-v5p-512; repeatable"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the config; repeatable",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an HTML report")
    return parser


def _run(args: argparse.Namespace) -> int:
    from pippin.core.hardware.accelerator import parse_target

    added = load_file(args.recipe_file) if args.recipe_file else []
    name = choose_recipe(args.recipe, args.recipe_file, added)
    cfg = configure(name, args.set)
    targets = [parse_target(target) for target in args.target]

    from pippin.core.atomic_file import write_atomic
    from pippin.train.hardware.estimate import estimate
    from pippin.train.hardware.estimate_text import details, page, table

    estimates = []
    for target in targets:
        print(f"compiling {name} for {target.name}", file=sys.stderr)
        estimates.append(estimate(cfg, target))
        print(details(estimates[-1]))
    print(table(estimates))
    if args.out:
        write_atomic(args.out, page(name, estimates))
        print(f"report  {args.out.absolute()}")
    return 0 if all(e.fits for e in estimates) else 1


if __name__ == "__main__":
    sys.exit(main())
