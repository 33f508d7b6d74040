"""A training job from its config to its summary: start, go on where an earlier attempt stopped, train, report.

The input is started first: its process reads and tokenises while this one
imports JAX and compiles. Of several processes each must know first which part
of a batch is its own, so they connect before that. All of them do all that is
done here; the first one alone writes the run's directory, checkpoints aside.
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
from pippin.core.config_tree import config_text
from pippin.core.errors import ConfigError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.cluster.environment import join
from pippin.train.display import Display
from pippin.train.errors import Preempted, Unavailable
from pippin.train.ledger import Bucket, Ledger
from pippin.train.run_directory import RunDirectory
from pippin.train.trainer_config import TrainerConfig
from pippin.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from pippin.train.cluster.share import Share
    from pippin.train.hardware.mesh_rules import Applied
    from pippin.train.step import TrainState
    from pippin.train.summary import Summary
    from pippin.train.trainer import Trainer

_PROMPT_TOKENS, _NEW_TOKENS = 48, 96


def run_job(cfg: TrainerConfig, out: Path, recipe: str, started: float | None = None) -> Summary | None:
    """Trains a config in a directory, or goes on with the run that the directory holds.

    Where this is one of several processes, all of them call this.

    Args:
        cfg: the run.
        out: its directory.
        recipe: the recipe's name, for reports.
        started: `time.monotonic()` when the process started, for the ledger.

    Returns:
        The figures of the run; on processes but the first, None.

    Raises:
        PippinError: what the user can put right; the run can be started again.
        Preempted: a signal asked to stop; the state is saved.
        Unavailable: a device or another process was lost.
    """
    ledger = Ledger(started)
    run = RunDirectory(out)
    record = pb.RunRecord(job=recipe, started=_now(), outcome=pb.RUN_OUTCOME_RUNNING)
    run.check(cfg)
    # A run that goes on keeps the tokenizer that it was started with.
    tokenizer = run.tokenizer if run.claimed_by(cfg) else None
    applied = _for_this_machine(cfg) if join() else None
    source, share = _start_input(cfg, applied, tokenizer)
    try:
        applied = applied or _for_this_machine(cfg)  # the input works meanwhile
        _claim(run, cfg)
        summary = _train(cfg, applied, run, recipe, source, share, ledger, record)
        record.outcome = pb.RUN_OUTCOME_COMPLETED
        return summary
    except BaseException as e:
        record.outcome = pb.RUN_OUTCOME_PREEMPTED if isinstance(e, Preempted) else pb.RUN_OUTCOME_FAILED
        record.error = f"{type(e).__name__}: {e}"
        if _is_loss(e):
            raise Unavailable(f"a device or a process was lost: {str(e).splitlines()[0]}") from e
        raise
    finally:
        source.close()
        record.ended = _now()
        record.ledger.CopyFrom(ledger.message())
        if record.devices:  # else the directory was never this process's: another one may be at work in it
            run.write_record(record)


def _for_this_machine(cfg: TrainerConfig) -> Applied:
    """The config for the devices that there are."""
    from pippin.core.compilation_cache import keep_compiled_programs
    from pippin.train.hardware.machine import for_this_machine

    keep_compiled_programs()
    return for_this_machine(cfg)


def _start_input(cfg: TrainerConfig, applied: Applied | None, tokenizer: Path | None) -> tuple[Any, Share]:
    """The input, and the part of each batch that it reads; of several processes where `applied` is given.

    Input that cannot be used is told here, before a directory is made.
    """
    from pippin.core import processes
    from pippin.train.cluster.share import Share, share_of_batch

    if applied is None:
        return cfg.input.build(tokenizer_dir=tokenizer), Share()
    mesh = applied.cfg.mesh
    share = share_of_batch(mesh, mesh.make(), cfg.input.batch_size)
    build = partial(cfg.input.build, process_index=share.index, process_count=share.count)
    return processes.together(lambda: build(tokenizer_dir=tokenizer)), share


def _claim(run: RunDirectory, cfg: TrainerConfig) -> None:
    from pippin.core import processes

    def require_seen() -> None:
        if not run.config.exists():
            raise ConfigError(
                f"{run.config} is not there on this machine, though process 0 has made it. Give an --out that all "
                "machines of the job share."
            )

    processes.first_alone(lambda: run.claim(cfg))
    processes.together(require_seen)


def _is_loss(error: BaseException) -> bool:
    """Whether JAX could not go on, for no fault of the program's that it names."""
    import jax

    faults = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(faults)


def _train(
    asked: TrainerConfig,
    applied: Applied,
    run: RunDirectory,
    recipe: str,
    source: Any,
    share: Share,
    ledger: Ledger,
    record: pb.RunRecord,
) -> Summary | None:
    from pippin.core import processes
    from pippin.train import loop
    from pippin.train.metric_writer import MetricWriter
    from pippin.train.sample_digest import SampleDigest

    cfg: TrainerConfig = applied.cfg
    trainer = cfg.build(held_out=partial(_held_out, source))
    first = processes.is_first()
    with ledger.into(Bucket.GOODPUT_BUCKET_COMPILE):
        step_fn = trainer.compile()
    with ledger.into(Bucket.GOODPUT_BUCKET_DATA):
        processes.together(lambda: trainer.require_vocabulary(source.tokenizer.vocab_size))
        processes.require_same("the config", config_text(asked).encode())
        processes.require_same("the input's text or tokenizer", source.state())
    with cfg.checkpointer.build(
        directory=run.checkpoints,
        component=asked.model,  # what a rule changed is of this machine, not of the model
        recipe=recipe,
        parameters=trainer.parameter_paths,
    ) as checkpointer:
        # The checkpointer holds the directory: from here on it is this job's alone.
        if first:
            record.devices = _devices()
            run.write_record(record)
        processes.first_alone(lambda: run.keep_tokenizer(source.tokenizer_dir))
        with ledger.into(Bucket.GOODPUT_BUCKET_RESTORE):
            state, before, notes = loop.restore(trainer, checkpointer, source)
        samples = SampleDigest(before, share)
        state = trainer.init(run.tokenizer) if state is None else state
        record.first_step = int(state.step)
        processes.first_alone(lambda: run.trim_metrics(record.first_step))
        with (
            MetricWriter(run, record.first_step + 1, quiet=not first) as writer,
            Display(cfg.steps, record.first_step, quiet=not first) as display,
        ):
            for note in [_opening(trainer, applied, run, recipe, record), *notes]:
                display.say(note)
            ledger.rest_into(Bucket.GOODPUT_BUCKET_STEP)
            state = loop.run(
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
    return _summarise(trainer, state, samples.total(), run, recipe, source, ledger, record)


def _devices() -> str:
    """Such as "8 x TPU v5p in 2 processes"."""
    import jax

    count = jax.process_count()
    together = f" in {count} processes" if count > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{together}"


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
) -> Summary | None:
    import numpy as np

    from pippin.core import processes
    from pippin.core.module import merge
    from pippin.layers.generate import generate
    from pippin.train.report import write_loss_plot, write_report
    from pippin.train.summary import Summary, unigram_perplexity

    cfg, tokenizer = trainer.cfg, load_tokenizer(run.tokenizer)
    # The first row of all: a process that reads another part of the batch has another one.
    row = np.asarray(next(_held_out(source, 1))["tokens"][0][:_PROMPT_TOKENS], np.int32)
    prompt = np.frombuffer(processes.gather(row.tobytes())[0], np.int32).tolist()
    stop = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
    model = merge(trainer.definition, trainer.measured(state))
    sampling = {"temperature": 0.7, "top_p": 0.95, "stop_ids": stop}
    written = list(generate(model, prompt, max_new_tokens=_NEW_TOKENS, **sampling))
    evaluator = cfg.evaluators[0]
    held_out = _held_out(source, evaluator.max_batches, evaluator.task)
    unigram = unigram_perplexity(source.token_counts(cfg.model.vocab_size), held_out)
    digest = fingerprint(state, samples)
    if not processes.is_first():
        return None
    evaluations = {m["step"]: m for m in run.read_metrics() if m["kind"] == evaluator.name}
    summary = Summary(
        recipe=recipe,
        num_params=trainer.num_params,
        devices=record.devices,
        untrained=evaluations[0]["perplexity"],
        unigram=unigram,
        trained=evaluations[cfg.steps]["perplexity"],
        prompt=tokenizer.decode(prompt),
        continuation=tokenizer.decode(written),
        input_report="\n".join(part.text() for part in source.summary()),
        ledger=ledger.message(),
        fingerprint=digest,
    )
    write_loss_plot(run, cfg)
    write_report(run, cfg, summary)
    return summary


def fingerprint(state: TrainState, samples: bytes) -> str:
    """A SHA-256 of every number of a training state and of all samples up to it. All processes ask for it together."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(samples)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode())
        whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(np.ascontiguousarray(jax.device_get(whole)).tobytes())
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
