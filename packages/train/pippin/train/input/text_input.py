"""The input of a run: packed batches from text, in an order that can be restored to the exact sample."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path

import numpy as np

from pippin.core.batch import Batch
from pippin.core.cache_dir import default_cache_dir
from pippin.core.errors import ConfigError, DataError
from pippin.core.tokenizer import Tokenizer, load_tokenizer
from pippin.train.input.config import BadInput, TextInputConfig
from pippin.train.input.order import Place, SampleOrder, TaskOrder
from pippin.train.input.packing import SEGMENTS, TARGETS, to_batch
from pippin.train.input.packing_process import PackingProcess
from pippin.train.input.plan import Plan, PlannedStore
from pippin.train.input.prefetch import Prefetch
from pippin.train.input.preflight import require_ready
from pippin.train.input.rejects import ReadReport
from pippin.train.input.sample_state import decode_state, encode_state
from pippin.train.input.store import StoreReader

_POLL_S = 0.02


@dataclasses.dataclass(frozen=True)
class StoreSummary:
    """What became of the text of one side of a task."""

    task: str
    split: str  # "train" or "heldout"
    complete: bool  # otherwise the counts are those so far
    rows: int
    tokens: int
    padding: float  # the share of the rows that is padding
    report: ReadReport
    rejected_file: str  # names everything that was rejected, a line each

    def text(self) -> str:
        """A line of counts, and a few on what was rejected: the first by name, and where all are named."""
        state = "" if self.complete else " (so far)"
        return (
            f"{self.task}/{self.split}{state}: {self.tokens} tokens in {self.rows} rows, "
            f"{self.padding:.1%} padding; {self.report.text(self.rejected_file)}"
        )


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The stores, and where they come from."""

    planned: list[PlannedStore]
    readers: list[StoreReader]

    def of(self, heldout: bool) -> list[tuple[PlannedStore, StoreReader]]:
        """The stores of one side, in the order of the tasks."""
        both = zip(self.planned, self.readers, strict=True)
        return [(store, reader) for store, reader in both if store.split.heldout == heldout]


class TextInput:
    """An endless iterator of training batches, and finite ones of held-out batches.

    Preparation starts when it is made, in the background: the text is read and
    packed by a process of its own, unless the cache has the packed rows, and a
    thread here makes batches of them ahead of time.

    The order of the samples is that of the global batches: a process takes its
    consecutive share of each, so how many processes there are changes nothing.

    Args:
        cfg: the config.
        process_index: which of the processes this is.
        process_count: how many share each batch.
        tokenizer_dir: the tokenizer to use instead of the config's: that of a run that goes on.
        cache_dir: where the tokenizer and the packed rows are kept; see `default_cache_dir`.

    Raises:
        ConfigError: the batch cannot be shared evenly, or `require_ready` refuses the config: at
            once, before anything is started.
        DataError: likewise, where a file or a directory is at fault.
    """

    Config = TextInputConfig

    def __init__(
        self,
        cfg: TextInputConfig,
        *,
        process_index: int = 0,
        process_count: int = 1,
        tokenizer_dir: Path | None = None,
        cache_dir: Path | None = None,
    ):
        if cfg.batch_size % process_count:
            raise ConfigError(
                f"TextInputConfig.batch_size ({cfg.batch_size}) must be a multiple of the number of processes "
                f"({process_count}), which share each batch. Set batch_size to a multiple of it."
            )
        self._cfg = cfg
        self._process_index, self._process_count = process_index, process_count
        self._tokenizer_dir = tokenizer_dir
        self._cache_dir = cache_dir or default_cache_dir()
        require_ready(cfg, self._cache_dir, tokenizer_dir)
        self._packing: PackingProcess | None = None
        self._closed, self._starting = threading.Event(), threading.Lock()
        self._tokenizer_ready: Future[Path] = Future()
        self._prepared: Future[_Prepared] = Future()
        self._state: bytes | None = None
        threading.Thread(target=self._prepare, daemon=True, name="prepare-input").start()
        self._batches = Prefetch(self._make_batches(None), cfg.prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch: this process's rows of it, [B, T].

        Raises:
            DataError: the text cannot be used, or the process that packs it has died.
        """
        batch, self._state = next(self._batches)
        return batch

    def state(self) -> bytes:
        """Which sample comes next: JSON, the same for all processes."""
        if self._state is None:
            stores = self._train_stores()
            self._state = encode_state(stores, [Place() for _ in stores], self._cfg.seed)
        return self._state

    def restore(self, state: bytes) -> None:
        """Goes on with the sample that `state()` named.

        Raises:
            DataError: the state is damaged, or the text, the tokenizer or the settings are other ones now.
        """
        places = decode_state(state, self._train_stores(), self._cfg.seed)
        self._batches.close()
        self._state = state
        self._batches = Prefetch(self._make_batches(places), self._cfg.prefetch)

    @property
    def tokenizer_dir(self) -> Path:
        """Where the tokenizer lies. Waits until it is there."""
        return self._tokenizer_ready.result()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Waits until it is there."""
        return load_tokenizer(self.tokenizer_dir)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of the mixture."""
        return tuple(task.name for task in self._cfg.mixture.tasks)

    def eval_batches(self, task: str | None = None, batch_size: int | None = None) -> Iterator[Batch]:
        """The held-out rows of a task, or of all, each once, in one order.

        All processes get equally many batches of one shape; the last is filled
        up with rows of padding, which weigh nothing.

        Args:
            task: the task's name.
            batch_size: rows of a global batch; by default that of training.

        Raises:
            DataError: there is no held-out text.
        """
        size = batch_size or self._cfg.batch_size
        share = size // self._process_count
        stores = [
            pair for pair in self._prepared.result().of(heldout=True) if task in (None, pair[0].task.name)
        ]
        rows = [(reader, row) for _, reader in stores for row in range(reader.completed().rows)]
        if not rows:
            raise DataError(
                f"{f'task {task!r}' if task else 'the mixture'} has no held-out text (tasks: "
                f"{', '.join(self.task_names)}). Give it more text, or lower heldout_every "
                f"({self._cfg.heldout_every}), which keeps one in so many pieces of it."
            )
        for begin in range(0, len(rows), size):
            first = begin + self._process_index * share
            packed = np.zeros((share, 3, self._cfg.sequence_length), np.int32)
            for i, (reader, row) in enumerate(rows[first : min(first + share, begin + size)]):
                packed[i] = reader.row(row)
            yield to_batch(packed)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id is a target in what is packed for training by now: [vocab_size], int64.

        Of each task at most the first 32 shards count, which tells enough of any text.
        """
        counts = np.zeros(vocab_size, np.int64)
        for _, reader in self._prepared.result().of(heldout=False):
            for shard in reader.shards(32):
                targets = shard[:, TARGETS][shard[:, SEGMENTS] > 0]
                counts += np.bincount(targets, minlength=vocab_size)
        return counts

    def summary(self) -> list[StoreSummary]:
        """What was read, packed and rejected so far, for each task and side."""
        if not self._prepared.done():
            return []
        prepared = self._prepared.result()
        summaries = []
        for store, reader in zip(prepared.planned, prepared.readers, strict=True):
            index = reader.peek()
            if index is not None:
                summaries.append(
                    StoreSummary(
                        task=store.task.name,
                        split=store.split.name,
                        complete=index.complete,
                        rows=index.rows,
                        tokens=index.tokens,
                        padding=index.padding(self._cfg.sequence_length),
                        report=index.report,
                        rejected_file=str(store.rejected_file),
                    )
                )
        return summaries

    def close(self) -> None:
        """Ends the process and the threads."""
        with self._starting:
            self._closed.set()
        self._batches.close()
        if self._packing:
            self._packing.close()

    # Preparation, in its own thread.

    def _prepare(self) -> None:
        try:
            self._prepared.set_result(self._prepare_stores())
        except BaseException as e:  # noqa: BLE001  raised again by whoever asks for the result
            if not self._tokenizer_ready.done():
                self._tokenizer_ready.set_exception(e)
            self._prepared.set_exception(e)

    def _prepare_stores(self) -> _Prepared:
        plan = Plan(self._cfg, self._cache_dir, self._tokenizer_dir)
        if not plan.has_tokenizer():
            self._start_packing()
            while not plan.has_tokenizer():
                self._waiting()
                time.sleep(_POLL_S)
        self._tokenizer_ready.set_result(plan.tokenizer_dir)
        planned = plan.stores()
        if self._packing is None and not all(store.complete() for store in planned):
            self._start_packing()
        readers = [StoreReader(store.directory, self._waiting) for store in planned]
        for store, reader in zip(planned, readers, strict=True):
            _require_allowed(self._cfg.bad_input, store, reader)
        return _Prepared(planned, readers)

    def _start_packing(self) -> None:
        with self._starting:
            self._require_open()
            self._packing = PackingProcess(self._cfg, self._cache_dir, self._tokenizer_dir)

    def _waiting(self) -> None:
        self._require_open()
        if self._packing:
            self._packing.check()

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise DataError("the input was closed while its text was prepared. Make a new one.")

    # Batches, in the thread that prefetches.

    def _make_batches(self, places: list[Place] | None) -> Iterator[tuple[Batch, bytes]]:
        stores = self._prepared.result().of(heldout=False)
        places = places or [Place() for _ in stores]
        tasks = [
            TaskOrder(store.task.name, reader, self._cfg.seed, place)
            for (store, reader), place in zip(stores, places, strict=True)
        ]
        order = SampleOrder(tasks, [store.task.rate for store, _ in stores])
        share = self._cfg.batch_size // self._process_count
        mine = slice(self._process_index * share, (self._process_index + 1) * share)
        while True:
            samples = [order.next_sample() for _ in range(self._cfg.batch_size)]
            rows = np.stack([reader.row(row) for reader, row in samples[mine]])
            yield to_batch(rows), encode_state([store for store, _ in stores], places, self._cfg.seed)

    def _train_stores(self) -> list[PlannedStore]:
        return [store for store, _ in self._prepared.result().of(heldout=False)]


def _require_allowed(bad_input: BadInput, store: PlannedStore, reader: StoreReader) -> None:
    """Raises `DataError` if a store of the cache lacks input that must not be lost."""
    index = reader.peek()
    if bad_input is BadInput.FATAL and index is not None and index.report.rejected:
        raise DataError(
            f"task {store.task.name!r} has input that cannot be used: {index.report.text(str(store.rejected_file))}\n"
            "Mend or remove it, or set bad_input=skip to go on without."
        )
