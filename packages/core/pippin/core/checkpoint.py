"""Checkpoints: the state of a training run, saved while it goes on, and checked when it is loaded.

A step is a folder:

    manifest.textproto     what the step holds, and the SHA-256 of each array and file
    component.textproto    the config tree of the model, so that others can open the step
    extra/                 named bytes, such as the state of the input
    arrays/                one folder an array, as Orbax writes them
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from pippin.core import checkpoint_arrays, manifest, processes
from pippin.core.checkpoint_arrays import PyTree
from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.checkpoint_steps import COMPONENT_FILE, EXTRA_FOLDER, CheckpointSteps, read_step
from pippin.core.component import to_text
from pippin.core.config import Config
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.v1 import model_pb2 as pb

_PART = "part-{}.binpb"  # what one process of several wrote
_EXTRA_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")

_NOISY_LOGGERS = ("absl", "asyncio")  # Orbax prints the stack of each of its threads when a write fails

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A step that was found damaged."""

    step: int
    problems: tuple[str, ...]  # one a file: "file: what"
    moved_to: Path

    def __str__(self) -> str:
        return f"step {self.step} (now {self.moved_to}): {'; '.join(self.problems)}"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A step that was loaded."""

    step: int
    state: PyTree
    extra: dict[str, bytes]
    skipped: tuple[Skipped, ...]  # newer steps that were damaged, newest first


class Checkpointer:
    """Saves to and loads from a directory of checkpoints, which it holds until it is closed.

    All processes of a job make the same calls. Nothing here is called by two
    threads at once.
    """

    Config = CheckpointerConfig

    def __init__(
        self,
        cfg: CheckpointerConfig,
        *,
        directory: str | Path,
        component: Config,
        recipe: str = "",
        parameters: Sequence[str] = ("params",),
    ):
        """Takes the directory, and clears away what a killed job left in it.

        Args:
            cfg: when to save and what to keep.
            directory: of the checkpoints; made if it is not there. Seen by all processes.
            component: the config tree of the model; stored with every step.
            recipe: the recipe's name, for the provenance.
            parameters: where in the state `open_model` finds the model's parameters: of those that lie under
                several of these paths it takes the last.

        Raises:
            CheckpointError: another job saves to the directory.
        """
        self.cfg = cfg
        self._component = component
        self._recipe = recipe
        self._parameters = tuple(parameters)
        self._steps = CheckpointSteps(Path(directory).absolute())
        self._primary = processes.is_first()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._saves = 0  # how many were begun
        self._saved: set[int] = set()
        processes.first_alone(self._steps.acquire)
        self._filter = _RaisedAnyway(self.directory)
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).addFilter(self._filter)

    def __enter__(self) -> Checkpointer:  # noqa: PYI034  the checks of annotations in tests refuse Self here
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        """The directory of the checkpoints."""
        return self._steps.directory

    def should_save(self, step: int) -> bool:
        """Whether the config wants this step."""
        return step % self.cfg.every_steps == 0

    def save(self, step: int, state: PyTree, extra: Mapping[str, bytes] | None = None) -> None:
        """Saves a step; returns when the state is copied to the host and may be donated.

        The rest is done while training goes on; `check` says whether it failed. One
        save runs at a time: the next one waits for it. A step that this object has
        saved already is not saved again.

        Args:
            step: how many training steps were done.
            state: a tree of JAX arrays. Each process writes the shards that it has.
            extra: bytes to save with it, by name; the same on every process.

        Raises:
            CheckpointError: an earlier save failed, or the state cannot be stored.
        """
        self.wait()
        if step in self._saved:
            return
        extra = dict(extra or {})
        for name in extra:
            if not _EXTRA_NAME.fullmatch(name):
                raise CheckpointError(
                    f"extra got the name {name!r}; it is a file's name. Use letters, digits, _ and -."
                )
        arrays = checkpoint_arrays.storable(state)
        self._saves += 1
        if self._primary:
            with self._cleared_if_it_fails(step):
                (self._steps.begin(step) / checkpoint_arrays.FOLDER).mkdir()
        self._barrier("checkpoint folder")
        with self._cleared_if_it_fails(step):
            chunks = checkpoint_arrays.to_host(arrays)
            self._steps.require_room(sum(chunk.values.nbytes for chunk in chunks))
            finish_writing = checkpoint_arrays.start_writing(self._steps.temporary(step), arrays)
        self._pending = self._worker.submit(self._finish, step, chunks, finish_writing, extra)

    def check(self) -> None:
        """Raises `CheckpointError` if the last save failed; called once a step, it costs nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete. Raises `CheckpointError` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and lets another job have the directory.

        Raises:
            CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._steps.release()
            for name in _NOISY_LOGGERS:
                logging.getLogger(name).removeFilter(self._filter)

    def load(self, template: PyTree, step: int | None = None) -> Restored | None:
        """The newest step that is whole, or the one that is asked for; None if nothing was saved yet.

        Every array and every byte is compared with its SHA-256. A damaged step is set
        aside: renamed, so that nothing takes it for a checkpoint.

        Args:
            template: a tree like the state that was saved, whose leaves have a shape, a
                dtype and a sharding: `jax.ShapeDtypeStruct`s or arrays. The sharding need
                not be the one that the step was saved with.
            step: None for the newest.

        Raises:
            CheckpointError: no step is whole, there is no such step, or it is of another model.
        """
        self.wait()
        there = self._steps.steps()
        if step is not None and step not in there:
            raise CheckpointError(f"{self.directory} has no step {step}. It has {there or 'none'}.")
        if not there:
            self._require_nothing_damaged()
            return None
        skipped: list[Skipped] = []
        for candidate in there if step is None else [step]:
            found, problems = None, ()
            try:
                found = self._load(candidate, template)
            except DamageError as e:
                problems = e.problems
            problems = _of_all_processes(problems)
            if found is not None and not problems:
                return dataclasses.replace(found, skipped=tuple(skipped))
            skipped.append(self._set_aside(candidate, problems))
        raise CheckpointError(
            f"no checkpoint in {self.directory} is whole: {' | '.join(map(str, skipped))}. Restore one from a copy, "
            "or start again in another directory."
        )

    def _load(self, step: int, template: PyTree) -> Restored:
        folder = self._steps.folder(step)
        message = read_step(folder)
        if message.step != step:
            raise DamageError(folder, [f"{manifest.FILE_NAME}: is of step {message.step}"])
        leaves = checkpoint_arrays.name_leaves(template)
        arrays = checkpoint_arrays.restore(folder, message.arrays, leaves)
        state = jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in leaves])
        names = [f.path for f in message.files if f.path.startswith(f"{EXTRA_FOLDER}/")]
        extra = {name.partition("/")[2]: (folder / name).read_bytes() for name in names}
        return Restored(step, state, extra, skipped=())

    def _set_aside(self, step: int, problems: tuple[str, ...]) -> Skipped:
        aside = self._steps.aside(step)
        self._barrier("checkpoint read")
        if self._primary:
            self._steps.set_aside(step, aside)
        self._barrier("checkpoint set aside")
        self._saved.discard(step)
        skipped = Skipped(step, problems, aside if aside.exists() else self._steps.folder(step))
        if self._primary:
            _log.warning("damaged checkpoint: %s", skipped)
        return skipped

    def _require_nothing_damaged(self) -> None:
        damaged = self._steps.damaged()
        if damaged:
            raise CheckpointError(
                f"{self.directory} holds damaged checkpoints alone: {', '.join(p.name for p in damaged)}. Restore one "
                "from a copy under its step's number, or remove them to start from the beginning."
            )

    def _finish(
        self,
        step: int,
        chunks: list[checkpoint_arrays.HostChunk],
        finish_writing: Callable[[], None],
        extra: Mapping[str, bytes],
    ) -> None:
        """The part of a save that training does not wait for."""
        with self._cleared_if_it_fails(step):
            folder = self._steps.temporary(step)
            described = checkpoint_arrays.describe(chunks)
            finish_writing()
            if jax.process_count() > 1:
                described = self._gather(folder, described)
            if self._primary:
                self._commit(step, folder, described, extra)
            self._barrier_in_background("committed")
        self._saved.add(step)

    def _gather(self, folder: Path, described: list[pb.CheckpointArray]) -> list[pb.CheckpointArray]:
        """What all processes say of their chunks, on the primary, when all chunks are written."""
        part = pb.CheckpointManifest(arrays=described).SerializeToString()
        manifest.write_file(folder / _PART.format(jax.process_index()), part)
        self._barrier_in_background("written")
        if not self._primary:
            return []
        everyone: list[pb.CheckpointArray] = []
        for process in range(jax.process_count()):
            path = folder / _PART.format(process)
            everyone += pb.CheckpointManifest.FromString(path.read_bytes()).arrays
            path.unlink()
        return everyone

    def _commit(
        self, step: int, folder: Path, described: list[pb.CheckpointArray], extra: Mapping[str, bytes]
    ) -> None:
        """Writes what is not an array, the manifest last, and makes the folder the step."""
        manifest.write_file(folder / COMPONENT_FILE, to_text(self._component).encode())
        (folder / EXTRA_FOLDER).mkdir()
        for name, data in extra.items():
            manifest.write_file(folder / EXTRA_FOLDER / name, data)
        arrays = checkpoint_arrays.merge(folder, described)
        chunk_files = {chunk.file for array in arrays for chunk in array.chunks}
        others = sorted(
            p
            for p in folder.rglob("*")
            if p.is_file() and p.relative_to(folder).as_posix() not in chunk_files
        )
        message = pb.CheckpointManifest(
            step=step,
            provenance=manifest.provenance(self._recipe, step, source=str(self.directory)),
            arrays=arrays,
            files=[manifest.describe_file(folder, p) for p in others],
            parameters=self._parameters,
        )
        manifest.write_manifest(folder, message)
        self._steps.commit(step)
        self._steps.keep(self.cfg.keep_last, self.cfg.keep_every_steps)

    @contextlib.contextmanager
    def _cleared_if_it_fails(self, step: int) -> Iterator[None]:
        """Removes what was written of a step when the block raises, and says that the step is not saved."""
        try:
            yield
        except Exception as e:
            if self._primary:
                self._steps.discard(step)
            if isinstance(e, CheckpointError):
                raise
            reason = str(e).partition("\n")[0].rstrip(".")
            raise CheckpointError(
                f"step {step} was not saved to {self.directory}: {reason}. Earlier checkpoints are as they were. "
                "Make room or mend what is wrong, and save again."
            ) from e

    def _barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            ocp.multihost.sync_global_processes(name)

    def _barrier_in_background(self, event: str) -> None:
        """A barrier that the devices, which are busy with training, have no part in."""
        key = f"{self.directory}: save {self._saves} is {event}"  # a key is used once
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(self.cfg.timeout_s * 1000))


class _RaisedAnyway(logging.Filter):
    """Drops the log records of errors that name a directory: `check` raises them, in one line."""

    def __init__(self, directory: Path):
        super().__init__()
        self._directory = directory

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and str(self._directory) in str(record.exc_info[1]))


def _of_all_processes(problems: tuple[str, ...]) -> tuple[str, ...]:
    """The problems that any process has, each once; the same on every process."""
    texts = processes.gather_text("\n".join(problems))
    return tuple(dict.fromkeys(line for text in texts for line in text.split("\n") if line))
