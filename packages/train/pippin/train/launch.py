"""The command `bazel run //packages/train:launch`, and `pippin-train`: trains a recipe.

Nothing heavy is imported before it is needed: `--help`, `--list` and
`--print-config` answer without JAX.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_STARTED = time.monotonic()

from pippin.core import config_tree
from pippin.core.command_line import run_command
from pippin.core.component import to_text
from pippin.core.errors import ConfigError
from pippin.layers import configs as _layers  # noqa: F401  so that --set knows every layer by its name
from pippin.train import recipe as recipes
from pippin.train.cluster.environment import run_as_one
from pippin.train.cluster.exit_codes import PREEMPTED, UNAVAILABLE
from pippin.train.cluster.options import add_options, job_arguments
from pippin.train.errors import Preempted, Unavailable
from pippin.train.trainer_config import TrainerConfig

DEFAULT_RECIPE = "stdlib_tiny"

_EPILOG = """
A run that was stopped goes on when the same command is run again. Examples:

  launch                                          trains a small model on Python's standard library
  launch --data 'books/**/*.txt' --out runs/mine  on text of your own
  launch --set model.decoder.layer.feed_forward=MoE --out runs/moe
                                                  with a mixture of experts in every layer
  launch -n 2                                     two processes on this machine, as on two machines
"""


def main(argv: Sequence[str] | None = None, at_end: Callable[[int], None] | None = None) -> int:
    """Runs the command; returns its exit code, which `at_end` gets if it is not 0."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    return run_as_one(lambda: run_command(lambda: _run(args, argv)), at_end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch",
        description="Trains a recipe. Without arguments, a small language model in minutes on a CPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or the options of `cluster` could not be told apart
    )
    parser.add_argument("--recipe", help=f"what to train (default: {DEFAULT_RECIPE})")
    parser.add_argument(
        "--recipe-file", type=Path, metavar="FILE", help="a Python file of your own with an @recipe"
    )
    parser.add_argument("--list", action="store_true", help="list the recipes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the config; repeatable",
    )
    parser.add_argument("--steps", type=int, help="how many steps to train (sets `steps`)")
    parser.add_argument(
        "--data", metavar="GLOB", help="train on these .txt, .jsonl, .jsonl.gz or .parquet files instead"
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help="the field of --data that holds the text (default: text)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's directory (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; an error if there is none"
    )
    parser.add_argument("--print-config", action="store_true", help="print the config as text, and stop")
    parser.add_argument(
        "--print-proto", action="store_true", help="print the config as a textproto, and stop"
    )
    parser.add_argument("--explain", action="store_true", help="say what would run on this machine, and stop")
    add_options(parser)
    return parser


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    added = recipes.load_file(args.recipe_file) if args.recipe_file else []
    if args.list:
        _print_list()
        return 0
    name = choose_recipe(args.recipe, args.recipe_file, added)
    cfg = configure(name, args.set, steps=args.steps, data=args.data, text_field=args.text_field)
    if args.print_config or args.print_proto:
        print(to_text(cfg) if args.print_proto else config_tree.config_text(cfg), end="")
        return 0
    if args.explain:
        from pippin.train.explain import explain

        print(explain(cfg), end="")
        return 0
    out = args.out or Path("runs") / name
    if args.resume and not (out / "trainer.textproto").exists():
        raise ConfigError(
            f"--resume: {out} holds no run. Leave out --resume to start one, or give its --out."
        )
    out = out.absolute()
    if args.backend != "local" or args.dry_run:
        return _submit(args, name, out, argv)
    if args.num_processes > 1 or args.max_restarts:
        return _train_together(cfg, out, argv, args)
    return _train(cfg, out, name)


def choose_recipe(named: str | None, file: Path | None, added: Sequence[str]) -> str:
    """The recipe that a command line means: the one it names, or that of the file, or the default one.

    Raises:
        ConfigError: the file has several, and none is named.
    """
    if named is None and len(added) > 1:
        raise ConfigError(f"{file} has several recipes. Choose with --recipe: {', '.join(added)}.")
    return named or (added[0] if added else DEFAULT_RECIPE)


def configure(
    name: str,
    changes: Sequence[str] = (),
    *,
    steps: int | None = None,
    data: str | None = None,
    text_field: str | None = None,
) -> TrainerConfig:
    """The config of a recipe with a command line's changes.

    Raises:
        ConfigError: there is no such recipe, or a change does not fit it.
    """
    cfg = recipes.get(name).make()
    if data is None and text_field is not None:
        raise ConfigError(
            f"--text-field {text_field!r} names a field of --data, and there is none. Give --data GLOB."
        )
    if data is not None:
        from pippin.train.input.config import use_files

        cfg = use_files(data, text_field or "text")(cfg)
    pairs: dict[str, str] = {}
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set got {change!r}. Write PATH=VALUE, such as learner.learning_rate=0.001.")
        pairs[path] = value
    if steps is not None:
        pairs["steps"] = str(steps)
    return config_tree.override(cfg, pairs)  # type: ignore[return-value]


def _print_list() -> None:
    known = recipes.all_recipes()
    width = max(map(len, known))
    for name, entry in known.items():
        print(f"{name:<{width}}  {entry.summary}")


def _train(cfg: TrainerConfig, out: Path, name: str) -> int:
    from pippin.train.job import run_job

    try:
        summary = run_job(cfg, out, name, started=_STARTED)
    except Preempted as e:
        print(f"{e}. Run the same command again to go on.", file=sys.stderr)
        return PREEMPTED
    except Unavailable as e:
        traceback.print_exc()
        print(f"{e}. Run the same command again to go on from the last checkpoint.", file=sys.stderr)
        return UNAVAILABLE
    if summary is None:  # the first process says it
        return 0
    from pippin.train.run_directory import RunDirectory

    print(summary.text(RunDirectory(out), cfg.steps))
    print(_next_commands(out))
    return 0


def _submit(args: argparse.Namespace, name: str, out: Path, argv: Sequence[str]) -> int:
    from pippin.train.cluster.options import launch_spec, make_backend

    if args.backend == "local":
        raise ConfigError(
            "--dry-run shows what a cluster would get, and --backend is local. Name another --backend."
        )
    spec = launch_spec(args, name, out, job_arguments(argv))
    backend = make_backend(args.backend, args.namespace, args.address)
    if args.dry_run:
        print(backend.render(spec), end="")
        return 0
    status = backend.submit(spec)
    print(status.text(spec.name))
    return status.outcome.exit_code if status.outcome else 0


def _train_together(cfg: TrainerConfig, out: Path, argv: Sequence[str], args: argparse.Namespace) -> int:
    from pippin.train.cluster.local import run_local
    from pippin.train.run_directory import RunDirectory

    run = RunDirectory(out)
    run.check(cfg)  # told once, and before anything is started or written
    command = [sys.executable, "-P", "-m", "pippin.train.launch", *job_arguments(argv)]
    restarts = args.max_restarts or 0
    return run_local(command, args.num_processes, logs=run.logs, max_restarts=restarts).exit_code


def _next_commands(out: Path) -> str:
    run = (
        "bazel run //packages/train:launch --" if "BUILD_WORKING_DIRECTORY" in os.environ else "pippin-train"
    )
    return (
        "next\n"
        f"  {run} --set model.decoder.layer.feed_forward=MoE --out runs/moe   # another architecture\n"
        f"  {run} --data 'PATTERN' --out runs/mine                            # text of your own\n"
        f"  tensorboard --logdir {out.parent}   # after pip install tensorboard"
    )


if __name__ == "__main__":
    sys.exit(main())
