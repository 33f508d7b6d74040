"""What must be made before the first batch: the tokenizer and the stores of packed rows, and where each lies.

The process that trains and the one that packs make the same plan from the same config.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from pippin.core.tokenizer import tokenizer_digest
from pippin.train.input.cache import digest, locked
from pippin.train.input.config import BadInput, TextInputConfig
from pippin.train.input.reading import Split, TextFile
from pippin.train.input.rejects import Rejects
from pippin.train.input.sources import TextSource, content_digest
from pippin.train.input.store import read_index
from pippin.train.input.tokenizer_training import TokenizerSource

_FORMAT = 1  # of packed rows: a new number when the same text would be packed otherwise


@dataclasses.dataclass(frozen=True)
class PlannedTask:
    """A task's source, with its files listed and their contents known by a digest."""

    name: str
    rate: float
    source: TextSource
    files: list[TextFile]
    identity: str  # changes with the files' contents and with how they are read


@dataclasses.dataclass(frozen=True)
class PlannedStore:
    """The packed rows of one side of a task."""

    task: PlannedTask
    split: Split
    max_rows: int | None
    sequence_length: int
    depends_on: dict[str, object]  # all that the rows depend on, by name
    directory: Path

    @property
    def rejected_file(self) -> Path:
        """The file that names everything that was rejected, a line each."""
        return self.directory / "rejected.txt"

    def complete(self) -> bool:
        """Whether it needs no work."""
        index = read_index(self.directory)
        return index is not None and index.complete


class Plan:
    """The tasks, the tokenizer and the stores of a config.

    Args:
        cfg: the config of the input.
        cache_dir: what is made lies in it.
        tokenizer_dir: the tokenizer to use instead of the config's, such as that of a run that goes on.

    Raises:
        DataError: a source has no files, or there is no tokenizer where one should be.
    """

    def __init__(self, cfg: TextInputConfig, cache_dir: Path, tokenizer_dir: Path | None):
        self.cfg = cfg
        self._cache_dir = cache_dir
        self.tasks = [
            _plan_task(task.name, task.rate, task.source.build(), cache_dir) for task in cfg.mixture.tasks
        ]
        self._trainer: TokenizerSource = cfg.tokenizer.build()
        existing = tokenizer_dir or self._trainer.directory()
        self._trains = existing is None
        self.tokenizer_dir = existing or cache_dir / "tokenizers" / digest(
            {
                "type": type(cfg.tokenizer).TYPE,
                "settings": self._trainer.settings(),
                "text": [[task.name, task.rate, task.identity] for task in self.tasks],
                "heldout_every": cfg.heldout_every,
            }
        )

    def has_tokenizer(self) -> bool:
        """Whether the tokenizer is there, so that `stores` may be asked for."""
        return not self._trains or self.tokenizer_dir.is_dir()

    def train_tokenizer(self, text_is_read: threading.Event) -> None:
        """Trains the tokenizer on the training side of the tasks, unless it is there or another process does."""
        with locked(self.tokenizer_dir.with_suffix(".lock")):
            if self.has_tokenizer():
                return
            draft = self.tokenizer_dir.with_name(f".{self.tokenizer_dir.name}.{uuid.uuid4().hex}")
            try:
                self._trainer.train(self._training_texts(text_is_read), draft)
                draft.rename(self.tokenizer_dir)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def _training_texts(self, text_is_read: threading.Event) -> Iterator[str]:
        """The first texts of each task, as many bytes as its rate says."""
        total = sum(task.rate for task in self.tasks)
        split, fatal = Split(False, self.cfg.heldout_every), self.cfg.bad_input is BadInput.FATAL
        for task in self.tasks:
            left = self._trainer.training_bytes() * task.rate / total
            for part in task.source.parts(task.files, split, Rejects(fatal=fatal)):
                if left <= 0:
                    break
                left -= len(part.text.encode())
                yield part.text
        text_is_read.set()

    def stores(self) -> list[PlannedStore]:
        """The training stores in the order of the tasks, then the held-out ones. The tokenizer must be there."""
        tokenizer = tokenizer_digest(self.tokenizer_dir)
        stores = []
        for heldout in (False, True):
            split = Split(heldout, self.cfg.heldout_every)
            max_rows = self.cfg.heldout_rows if heldout else None
            for task in self.tasks:
                depends_on: dict[str, object] = {
                    "text": task.identity,
                    "tokenizer": tokenizer,
                    "sequence_length": self.cfg.sequence_length,
                    "heldout_every": self.cfg.heldout_every,
                    "split": split.name,
                    "max_rows": max_rows,
                    "format": _FORMAT,
                }
                directory = self._cache_dir / "packed" / digest(depends_on)
                stores.append(
                    PlannedStore(task, split, max_rows, self.cfg.sequence_length, depends_on, directory)
                )
        return stores


def _plan_task(name: str, rate: float, source: TextSource, cache_dir: Path) -> PlannedTask:
    files = source.files()
    identity = digest([type(source).__name__, source.settings(), content_digest(files, cache_dir)])
    return PlannedTask(name, rate, source, files, identity)
