"""The directory of a run: what it holds, and whose it is.

RUN/trainer.textproto   the whole config tree of the run
RUN/tokenizer/          the tokenizer that the model was trained with
RUN/checkpoints/STEP/   the training state (pippin.core.checkpoint)
RUN/metrics.jsonl       one line a logged step or evaluation
RUN/tensorboard/        the same, for TensorBoard
RUN/record.textproto    what became of the last attempt, and where its time went
RUN/loss.png            the loss curve
RUN/report.html         the run at a glance
RUN/logs/process-I.log  what each process of a job of several printed
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message

from pippin.core.atomic_file import write_atomic
from pippin.core.component import from_text, to_text
from pippin.core.config import Config
from pippin.core.config_tree import diff
from pippin.core.errors import ConfigError
from pippin.core.tokenizer import copy_tokenizer
from pippin.train.trainer_config import TrainerConfig

_SHOWN_DIFFERENCES = 20


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "trainer.textproto"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.record = path / "record.textproto"
        self.loss_plot = path / "loss.png"
        self.report = path / "report.html"
        self.logs = path / "logs"

    def claimed_by(self, cfg: TrainerConfig) -> bool:
        """Whether the directory holds a run of this config, on whatever mesh, with its tokenizer."""
        return self.tokenizer.exists() and self.config.exists() and _is_same(self._read_config(), cfg)

    def check(self, cfg: TrainerConfig) -> None:
        """Raises `ConfigError` if the directory holds a run of another config, or files that are no run's."""
        if self.config.exists():
            theirs = self._read_config()
            # Where nothing was trained yet, an attempt that failed early holds no directory.
            if not _is_same(theirs, cfg) and any(self.checkpoints.glob("[0-9]*")):
                raise ConfigError(
                    f"{self.path} holds a run of another config. The differences (there -> now):\n  "
                    + "\n  ".join(_shown(diff(theirs, cfg)))
                    + "\nA run goes on with its own config only. Give this one another --out, or remove the directory."
                )
            return
        if self.path.exists() and not (
            # A name with a dot is a file that a kill left half-written. Logs are there before the job starts.
            self.path.is_dir() and all(p.name.startswith(".") or p == self.logs for p in self.path.iterdir())
        ):
            raise ConfigError(
                f"--out {self.path} is not empty and holds no run (no {self.config.name}). "
                "Give an empty or new directory, so that nothing is overwritten."
            )

    def claim(self, cfg: TrainerConfig) -> bool:
        """Makes the directory for a run of this config; whether it held one already.

        Raises:
            ConfigError: as `check`.
        """
        self.check(cfg)
        if self.config.exists() and _is_same(theirs := self._read_config(), cfg):
            if theirs != cfg:
                write_atomic(self.config, to_text(cfg))
            return True
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, to_text(cfg))
        # Of an attempt with another config that trained nothing:
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        self.trim_metrics(-1)
        return False

    def _read_config(self) -> Config:
        try:
            return from_text(self.config.read_text())
        except ConfigError as e:
            raise ConfigError(
                f"{self.config} cannot be read: {e} Restore it from a copy, or give another --out."
            ) from None

    def keep_tokenizer(self, source: Path) -> None:
        """Copies a tokenizer into the run, whole or not at all, unless it has one."""
        if self.tokenizer.exists():
            return
        temporary = self.path / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_tokenizer(source, temporary)
        temporary.rename(self.tokenizer)

    def trim_metrics(self, last_step: int) -> None:
        """Drops the lines of steps after `last_step`, which will be done again, and a half-written last one."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a kill
            if values["step"] <= last_step:
                kept.append(line)
        write_atomic(self.metrics, "".join(line + "\n" for line in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return (
            [json.loads(line) for line in self.metrics.read_text().splitlines()]
            if self.metrics.exists()
            else []
        )

    def write_record(self, record: Message) -> None:
        """Writes record.textproto."""
        write_atomic(self.record, text_format.MessageToString(record))


def _is_same(theirs: Config, cfg: TrainerConfig) -> bool:
    """Whether two configs are of one run: it may go on with another mesh, and with other mesh rules."""
    return isinstance(theirs, TrainerConfig) and cfg == theirs.set(mesh=cfg.mesh, mesh_rules=cfg.mesh_rules)


def _shown(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN_DIFFERENCES
    return [*lines[:_SHOWN_DIFFERENCES], f"... and {more} more"] if more > 0 else lines
