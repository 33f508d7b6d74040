"""The command `bazel run //packages/export:latency`, and `pippin-latency`: what a model would take on Apple's chips."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pippin.core.atomic_file import write_atomic
from pippin.core.command_line import run_command
from pippin.core.errors import CheckpointError, ConfigError
from pippin.export.latency.chips import BANDWIDTH_SHARE, CHIPS, COMPUTE_SHARE
from pippin.export.latency.operations import Operation, operations
from pippin.export.latency.page import latency_page


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)

    def told() -> int:
        print(_run(args))
        return 0

    return run_command(told)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latency",
        description="Estimates what a model takes on Apple's chips, by their published figures.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a bundle, compressed or not, or another model"
    )
    parser.add_argument(
        "--context", type=int, default=512, metavar="TOKENS", help="that the cache holds (default: 512)"
    )
    parser.add_argument(
        "--prefill", type=int, default=64, metavar="TOKENS", help="of a prompt at a time (default: 64)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a page to click through")
    return parser


def _run(args: argparse.Namespace) -> str:
    from pippin.core.module import flatten_params
    from pippin.layers.causal_lm_config import CausalLMConfig
    from pippin.layers.model_files import open_model
    from pippin.layers.named_models import find_model
    from pippin.layers.quant.settle import settled

    if args.context < 1 or not 1 <= args.prefill <= args.context:
        raise ConfigError(
            f"--context {args.context} and --prefill {args.prefill}: a cache holds at least one token, and a prompt's part of at "
            "least one is no longer than it. Give others."
        )
    model = open_model(find_model(args.model))
    if not isinstance(model.component, CausalLMConfig):
        raise CheckpointError(
            f"{args.model} holds a {type(model.component).__name__}, which is no language model."
        )
    cfg, params = settled(model.component, model.params())
    # A compressed model has no stacks, so that its names are these already.
    weights = {**flatten_params(params), **model.quantized}
    steps = {
        f"decode (1 token, context {args.context})": operations(cfg, weights, 1, args.context),
        f"prefill ({args.prefill} tokens, context {args.context})": operations(
            cfg, weights, args.prefill, args.context
        ),
    }
    if args.out is not None:
        try:
            write_atomic(args.out, latency_page(f"{Path(args.model).name} on Apple's chips", steps))
        except OSError as e:
            raise CheckpointError(
                f"--out {args.out} cannot be written: {e.strerror}. Give the name of a file."
            ) from None
    decode, prefill = steps.values()
    return table(decode, prefill, args.prefill)


def table(decode: Sequence[Operation], prefill: Sequence[Operation], tokens: int) -> str:
    """A row for each chip."""
    nbytes, flops = sum(o.nbytes for o in decode), sum(o.flops for o in prefill)
    lines = [
        f"a token reads and writes {nbytes / 1e6:.1f} MB; {tokens} tokens of a prompt take {flops / 1e9:.1f} GFLOP",
        f"{'chip':12}{'GB/s':>8}{'TOPS':>7}{'ms/token':>10}{'tokens/s':>10}{'prompt: ms/token':>18}",
    ]
    for chip in CHIPS:
        one, many = (sum(o.seconds(chip) for o in of) for of in (decode, prefill))
        lines.append(
            f"{chip.name:12}{chip.gigabytes_per_s:>8.1f}{chip.float16_tops:>7.1f}{one * 1e3:>10.2f}{1 / one:>10.0f}"
            f"{many / tokens * 1e3:>18.3f}"
        )
    lines.append(
        f"Estimates, measured on no device: {BANDWIDTH_SHARE:.0%} of the published bandwidth, and {COMPUTE_SHARE:.0%} of the "
        "Neural Engine's float16 operations. What it takes to start an operation is not counted: small models take longer."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
