"""The part of launch's command line that says where a job runs, apart from what it trains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pippin.core.errors import ConfigError
from pippin.train.cluster.backend import Backend
from pippin.train.cluster.launch_spec import LaunchSpec, parse_duration, parse_pairs

CLUSTERS = ("jobset", "slurm", "ray")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to launch's."""
    group = parser.add_argument_group("where it runs (docs/launch.md)")
    group.add_argument(
        "--backend",
        choices=("local", *CLUSTERS),
        default="local",
        help="this machine (the default), Kubernetes JobSet, SLURM, or Ray",
    )
    group.add_argument(
        "-n",
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="how many processes train together: on this machine, or of a cluster's CPUs",
    )
    group.add_argument(
        "--target", metavar="KIND-COUNT", help="the accelerators of a cluster, such as tpu-v5p-512"
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="how often to start again where a process was lost (default: 0 here, 3 on a cluster)",
    )
    group.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    group.add_argument("--name", help="the job's (default: the recipe's)")
    group.add_argument("--image", help="the container image that pods run (jobset)")
    group.add_argument("--queue", help="Kueue's local queue (jobset), or the partition (slurm)")
    group.add_argument("--namespace", default="default", help="Kubernetes' (jobset)")
    group.add_argument("--time-limit", metavar="TIME", help="such as 90m, 12h or 7d")
    group.add_argument(
        "--address", help="of Ray's dashboard, http://HOST:8265; without it, Ray runs here (ray)"
    )
    for option, meaning in (
        ("--env", "a variable of each process's environment"),
        ("--volume", "a persistent volume claim, and where it is mounted (jobset)"),
        ("--node-selector", "labels of nodes, in place of the accelerator's own (jobset)"),
    ):
        group.add_argument(
            option, action="append", default=[], metavar="NAME=VALUE", help=f"{meaning}; repeatable"
        )


def job_arguments(argv: Sequence[str]) -> list[str]:
    """What of a command line each process of the job gets: all but these options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    return parser.parse_known_args(list(argv))[1]


def launch_spec(args: argparse.Namespace, recipe: str, out: Path, arguments: Sequence[str]) -> LaunchSpec:
    """The job that a command line describes.

    Args:
        args: with the options of `add_options`.
        recipe: its name.
        out: the run's directory.
        arguments: launch's, of each process.

    Raises:
        ConfigError: an option is not as it must be.
    """
    from pippin.core.hardware.accelerator import parse_target

    if args.target and args.num_processes > 1:
        raise ConfigError(
            f"--target {args.target} says how many processes there are, one a host, and -n says {args.num_processes}. "
            "Leave out one of them."
        )
    # Where a path is relative, the processes would start elsewhere.
    others = [a for a in arguments if a != "--out" and not a.startswith("--out=")]
    if len(others) < len(arguments) and "--out" in arguments:
        del others[list(arguments).index("--out")]
    return LaunchSpec(
        name=args.name or recipe.replace("_", "-").lower(),
        arguments=(*others, "--out", str(out)),
        out=str(out),
        target=parse_target(args.target) if args.target else None,
        num_processes=args.num_processes,
        image=args.image or "",
        queue=args.queue or "",
        namespace=args.namespace,
        env=parse_pairs("--env", args.env),
        volumes=parse_pairs("--volume", args.volume),
        node_selector=parse_pairs("--node-selector", args.node_selector),
        max_restarts=3 if args.max_restarts is None else args.max_restarts,
        time_limit_s=parse_duration(args.time_limit) if args.time_limit else None,
    )


def make_backend(name: str, namespace: str = "default", address: str | None = None) -> Backend:
    """The backend of a name."""
    if name == "jobset":
        from pippin.train.cluster.jobset import JobSetBackend

        return JobSetBackend(namespace)
    if name == "slurm":
        from pippin.train.cluster.slurm import SlurmBackend

        return SlurmBackend()
    from pippin.train.cluster.ray_jobs import RayBackend

    return RayBackend(address)
