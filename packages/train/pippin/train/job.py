"""A training job from its config to its summary: start, go on where an earlier attempt stopped, train, report.

The input is started first: its process reads and tokenises while this one
imports JAX and compiles.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pippin.core.batch import Batch
from pippin.core.errors import ConfigError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.display import Display
from pippin.train.errors import Preempted
from pippin.train.ledger import Bucket, Ledger
from pippin.train.run_directory import RunDirectory
from pippin.train.trainer_config import TrainerConfig
from pippin.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from pippin.train.hardware.mesh_rules import Applied
    from pippin.train.step import TrainState
    from pippin.train.summary import Summary
    from pippin.train.trainer import Trainer

_PROMPT_TOKENS, _NEW_TOKENS = 48, 96


def run_job(cfg: TrainerConfig, out: Path, recipe: str, started: float | None = None) -> Summary:
    """Trains a config in a directory, or goes on with the run that the directory holds.

    Args:
        cfg: the run.
        out: its directory.
        recipe: the recipe's name, for reports.
        started: `time.monotonic()` when the process started, for the ledger.

    Raises:
        PippinError: what the user can put right; the run can be started again.
        Preempted: a signal asked to stop; the state is saved.
    """
    ledger = Ledger(started)
    run = RunDirectory(out)
    record = pb.RunRecord(job=recipe, started=_now(), outcome=pb.RUN_OUTCOME_RUNNING)
    run.check(cfg)
    # A run that goes on keeps the tokenizer that it was started with. Input that cannot be used is told
    # here, before a directory is made.
    source = cfg.input.build(tokenizer_dir=run.tokenizer if run.claimed_by(cfg) else None)
    try:
        applied = _for_this_machine(cfg)
        run.claim(cfg)
        summary = _train(cfg, applied, run, recipe, source, ledger, record)
        record.outcome = pb.RUN_OUTCOME_COMPLETED
        return summary
    except BaseException as e:
        record.outcome = pb.RUN_OUTCOME_PREEMPTED if isinstance(e, Preempted) else pb.RUN_OUTCOME_FAILED
        record.error = f"{type(e).__name__}: {e}"
        raise
    finally:
        source.close()
        record.ended = _now()
        record.ledger.CopyFrom(ledger.message())
        if record.devices:  # else the directory was never this job's: another one may be at work in it
            run.write_record(record)


def _for_this_machine(cfg: TrainerConfig) -> Applied:
    """The config for the devices that there are, before a directory is made. The input works meanwhile."""
    import jax

    from pippin.train.hardware.compilation_cache import keep_compiled_programs
    from pippin.train.hardware.machine import for_this_machine

    keep_compiled_programs()
    if jax.process_count() > 1:
        raise ConfigError(
            f"this job has {jax.process_count()} processes; launch trains with one process, over all its devices. "
            "Start it on one host."
        )
    return for_this_machine(cfg)


def _train(
    asked: TrainerConfig,
    applied: Applied,
    run: RunDirectory,
    recipe: str,
    source: Any,
    ledger: Ledger,
    record: pb.RunRecord,
) -> Summary:
    import jax

    from pippin.train import loop
    from pippin.train.metric_writer import MetricWriter

    cfg: TrainerConfig = applied.cfg
    trainer = cfg.build(held_out=partial(_held_out, source))
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    with ledger.into(Bucket.GOODPUT_BUCKET_COMPILE):
        step_fn = trainer.compile()
    with ledger.into(Bucket.GOODPUT_BUCKET_DATA):
        trainer.require_vocabulary(source.tokenizer.vocab_size)
    with cfg.checkpointer.build(
        directory=run.checkpoints,
        component=asked.model,  # what a rule changed is of this machine, not of the model
        recipe=recipe,
        parameters=trainer.parameter_paths,
    ) as checkpointer:
        # The checkpointer holds the directory: from here on it is this job's alone.
        record.devices = devices
        run.write_record(record)
        run.keep_tokenizer(source.tokenizer_dir)
        with ledger.into(Bucket.GOODPUT_BUCKET_RESTORE):
            state, samples, notes = loop.restore(trainer, checkpointer, source)
        state = trainer.init(run.tokenizer) if state is None else state
        record.first_step = int(state.step)
        run.trim_metrics(record.first_step)
        with (
            MetricWriter(run, record.first_step + 1) as writer,
            Display(cfg.steps, record.first_step) as display,
        ):
            for note in [_opening(trainer, applied, run, recipe, record), *notes]:
                display.say(note)
            ledger.rest_into(Bucket.GOODPUT_BUCKET_STEP)
            state, samples = loop.run(
                trainer,
                step_fn,
                state,
                source,
                samples,
                checkpointer=checkpointer,
                writer=writer,
                display=display,
                ledger=ledger,
            )
            ledger.rest_into(Bucket.GOODPUT_BUCKET_OTHER)
    record.last_step = int(state.step)
    return _summarise(trainer, state, samples, run, recipe, source, ledger, record)


def _opening(trainer: Trainer, applied: Applied, run: RunDirectory, recipe: str, record: pb.RunRecord) -> str:
    resumed = f", from the checkpoint of step {record.first_step}" if record.first_step else ""
    rule = f"; mesh rule {applied.rule.accelerators}" if applied.rule and applied.rule.modifiers else ""
    return (
        f"{recipe}: {trainer.num_params / 1e6:.1f}M parameters, {trainer.cfg.steps} steps on {record.devices}"
        f"{resumed}{rule}; {run.path}"
    )


def _summarise(
    trainer: Trainer,
    state: TrainState,
    samples: bytes,
    run: RunDirectory,
    recipe: str,
    source: Any,
    ledger: Ledger,
    record: pb.RunRecord,
) -> Summary:
    from pippin.core.module import merge
    from pippin.layers.generate import generate
    from pippin.train.report import write_loss_plot, write_report
    from pippin.train.summary import Summary, unigram_perplexity

    cfg, tokenizer = trainer.cfg, load_tokenizer(run.tokenizer)
    row = next(_held_out(source, 1))["tokens"][0]
    prompt = [int(t) for t in row[:_PROMPT_TOKENS]]
    stop = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
    model = merge(trainer.definition, trainer.measured(state))
    written = generate(model, prompt, max_new_tokens=_NEW_TOKENS, temperature=0.7, top_p=0.95, stop_ids=stop)
    evaluator = cfg.evaluators[0]
    evaluations = {m["step"]: m for m in run.read_metrics() if m["kind"] == evaluator.name}
    held_out = _held_out(source, evaluator.max_batches, evaluator.task)
    summary = Summary(
        recipe=recipe,
        num_params=trainer.num_params,
        devices=record.devices,
        untrained=evaluations[0]["perplexity"],
        unigram=unigram_perplexity(source.token_counts(cfg.model.vocab_size), held_out),
        trained=evaluations[cfg.steps]["perplexity"],
        prompt=tokenizer.decode(prompt),
        continuation=tokenizer.decode(list(written)),
        input_report="\n".join(part.text() for part in source.summary()),
        ledger=ledger.message(),
        fingerprint=fingerprint(state, samples),
    )
    write_loss_plot(run, cfg)
    write_report(run, cfg, summary)
    return summary


def fingerprint(state: TrainState, samples: bytes) -> str:
    """A SHA-256 of every number of a training state and of all samples up to it."""
    import jax
    import numpy as np

    digest = hashlib.sha256(samples)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def _held_out(source: Any, most: int, task: str | None = None) -> Iterator[Batch]:
    """The first held-out batches, the same each time: of one task, or of each in turn."""
    if task is not None and task not in source.task_names:
        raise ConfigError(
            f"an evaluator got the task {task!r}; the input has {', '.join(source.task_names)}. Name one of them, or "
            "none, to measure all in turn."
        )
    tasks = source.task_names if task is None else [task]
    rounds = itertools.zip_longest(*(source.eval_batches(name) for name in tasks))
    return itertools.islice((batch for turn in rounds for batch in turn if batch is not None), most)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
