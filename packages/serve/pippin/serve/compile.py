"""The command `bazel run //packages/serve:compile`: what serving a model will be on TPUs that are not here.

Compiles the true programs of a step, with the true split over the devices, by libtpu, which is the TPUs' compiler.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from pippin.core.errors import CheckpointError, ConfigError, PippinError
from pippin.core.hardware.accelerator import Target, parse_target
from pippin.layers import configs as _layers  # noqa: F401  stored models name every layer by its type
from pippin.layers.causal_lm_config import CausalLMConfig

# Name -> the module of `pippin.layers.models` that has it.
_MODELS = {
    "afm_on_device_2024": "afm_on_device_2024",
    "afm_on_device_2025": "afm_on_device_2025",
    "afm_server_2024": "afm_server_2024",
    "llama2_7b": "llama",
    "llama2_70b": "llama",
    "llama3_8b": "llama",
    "llama3_2_1b": "llama",
    "qwen3_0_6b": "llama",
    "smollm2_135m": "llama",
}
_EPILOG = """
Examples:

  compile --model afm_on_device_2024 --target tpu-v5e-8
  compile --model runs/mine --target tpu-v5e-1 --target tpu-v5e-4 --context 8192
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for a mistake of the user's, 1 where a model does not fit."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))  # under bazel run: where the user typed it
    try:
        return _run(args)
    except PippinError as error:
        print(f"compile: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compile",
        description="Compiles the programs that serve a model, for TPUs that are not here, and says what they will be.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|DIR", help=f"a model on disk, or one of {', '.join(_MODELS)}")
    add("--target", action="append", required=True, metavar="NAME", help="such as tpu-v5e-8; repeatable")
    add(
        "--context",
        type=int,
        default=4096,
        metavar="TOKENS",
        help="of each text that is served (%(default)s)",
    )
    add(
        "--weights", choices=("float", "int8"), default="float", help="of linear maps (%(default)s: bfloat16)"
    )
    add(
        "--kv-cache",
        choices=("float", "int8"),
        default="float",
        help="keys and values (%(default)s: bfloat16)",
    )
    add("--max-requests", type=int, default=32, help="served at a time (%(default)s)")
    add("--chunk-tokens", type=int, default=512, help="of prompts in a step (%(default)s)")
    return parser


def _run(args: argparse.Namespace) -> int:
    targets = [parse_target(name) for name in args.target]
    for target in targets:
        if target.platform != "tpu" or target.num_slices > 1:
            raise ConfigError(
                f"{target.name}: programs that serve are compiled for one slice of TPUs. Name one, such as tpu-v5e-8."
            )
    cfg = _model(args.model)
    fits = [_compile(cfg, args, target) for target in targets]
    return 0 if all(fits) else 1


def _model(name: str) -> CausalLMConfig:
    """The config of a model.

    Raises:
        CheckpointError: there is none.
    """
    if name in _MODELS:
        return getattr(importlib.import_module(f"pippin.layers.models.{_MODELS[name]}"), name)()
    from pippin.layers.model_files import open_model
    from pippin.layers.named_models import find_model

    cfg = open_model(find_model(name)).component
    if not isinstance(cfg, CausalLMConfig):
        raise CheckpointError(f"{name} holds a {type(cfg).__name__}, which is no language model.")
    return cfg


def _compile(cfg: CausalLMConfig, args: argparse.Namespace, target: Target) -> bool:
    """Compiles for one target and prints what came out; whether it fits."""
    from pippin.serve.compiled import estimate, table
    from pippin.serve.engine.scheduler import Limits

    limits = Limits(
        num_pages=args.max_requests * -(-args.context // 16),
        longest=args.context,
        max_requests=args.max_requests,
        chunk_tokens=args.chunk_tokens,
        row_tokens=min(128, args.chunk_tokens),
    )
    print(f"compiling for {target.name}", file=sys.stderr)
    found = estimate(cfg, limits, target, args.weights == "int8", args.kv_cache == "int8")
    print(table(found))
    return found.fits


if __name__ == "__main__":
    sys.exit(main())
