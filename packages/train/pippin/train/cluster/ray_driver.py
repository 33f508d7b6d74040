"""The program that Ray runs for a job: it starts the workers, and again where one was lost.

python -m pippin.train.cluster.ray_driver JSON
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from pippin.train.cluster import environment
from pippin.train.cluster.exit_codes import DONE, Outcome, outcome_of
from pippin.train.cluster.ray_jobs import RayJob


def main() -> int:
    """Runs the job of the command line."""
    outcome = drive(RayJob(**json.loads(sys.argv[1])))
    if outcome is not Outcome.DONE:
        print(f"exit code {outcome.exit_code}", file=sys.stderr)
    return outcome.exit_code


def drive(job: RayJob) -> Outcome:
    """How a job ended, tried again within its budget."""
    logs = Path(job.out, "logs")
    logs.mkdir(parents=True, exist_ok=True)
    ray = _ray()
    ray.init(ignore_reinit_error=True, log_to_driver=True, runtime_env={"env_vars": job.env})
    try:
        outcome = Outcome.RETRYABLE
        for restart in range(job.max_restarts + 1):
            outcome = _attempt(job, logs / f"{job.name}.ends")
            if outcome is not Outcome.RETRYABLE:
                break
            print(f"a process was lost ({restart} of {job.max_restarts} restarts were used)", file=sys.stderr)
        return outcome
    finally:
        ray.shutdown()


def _attempt(job: RayJob, ends: Path) -> Outcome:
    """One start of the workers. Those that end for a reason of their own write it down; Ray sees only that they end."""
    ends.unlink(missing_ok=True)
    train = _ray("train")
    trainer = _ray("train.v2.jax").JaxTrainer(
        _work,
        train_loop_config={"arguments": job.arguments, "ends": str(ends)},
        scaling_config=train.ScalingConfig(**job.scaling),
        run_config=train.RunConfig(name=job.name, storage_path=str(Path(job.out, "logs", "ray"))),
    )
    try:
        trainer.fit()
    except _ray("train.v2.api.exceptions").TrainingFailedError as e:
        if not ends.exists():
            print(str(e).splitlines()[0], file=sys.stderr)
            return Outcome.RETRYABLE
    return outcome_of(int(ends.read_text().split()[0])) if ends.exists() else Outcome.DONE


def _work(config: dict[str, Any]) -> None:
    """A worker: one process of the job. On CPUs JaxTrainer does not connect them."""
    import jax

    from pippin.train import launch

    context = _ray("train").get_context()

    if not jax.distributed.is_initialized():
        address = (
            f"{_ray('util').get_node_ip_address()}:{environment.free_port()}"
            if context.get_world_rank() == 0
            else None
        )
        os.environ[environment.COORDINATOR] = _ray("train.collective").broadcast_from_rank_zero(address)
        os.environ[environment.NUM_PROCESSES] = str(context.get_world_size())
        os.environ[environment.PROCESS_ID] = str(context.get_world_rank())

    def note(code: int) -> None:
        with open(config["ends"], "a") as ends:
            ends.write(f"{code}\n")

    code = launch.main(config["arguments"], at_end=note)
    if code != DONE:
        raise RuntimeError(f"exit code {code}")


def _ray(module: str = "") -> Any:
    """A module of Ray, which is there where this program runs, and not everywhere that this file is."""
    return importlib.import_module(f"ray.{module}" if module else "ray")


if __name__ == "__main__":
    sys.exit(main())
