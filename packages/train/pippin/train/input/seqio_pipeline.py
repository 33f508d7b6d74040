"""The seqio pipeline: tasks of text, their tokenisation, and the mixture; packed into stores.

The only file of pippin that imports seqio, and with it TensorFlow: it runs in
the packing process (`worker`), and not at all where the stores are complete.

Source: Roberts et al. 2022, arXiv:2203.17189, section 3 (seqio's tasks and mixtures).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from pippin.core.errors import PippinError
from pippin.core.tokenizer import Tokenizer
from pippin.train.input.packing import Packer
from pippin.train.input.plan import PlannedStore, PlannedTask
from pippin.train.input.reading import Part, Split
from pippin.train.input.rejects import Rejects
from pippin.train.input.store import StoreWriter

_END = object()
# A call of Python from TensorFlow takes longer than a short text: so many are handed over at a time.
_GROUP, _GROUP_CHARACTERS = 64, 1 << 16


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer of pippin as a vocabulary of seqio.

    Not `seqio.SentencePieceVocabulary`: it opens SentencePiece models alone, and
    in those the mark of spaces comes back as a space.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.RaggedTensor:
        """The ids of each of several texts [n]: one call of Python for all, as each call takes long."""

        def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ids = [self.tokenizer.encode(text.decode()) for text in texts]
            flat = np.asarray([*itertools.chain.from_iterable(ids)], np.int32)
            return flat, np.asarray([len(of_one) for of_one in ids], np.int64)

        ids, lengths = tf.numpy_function(encode, [s], [tf.int32, tf.int64])
        ids.set_shape([None])
        lengths.set_shape([None])
        return tf.RaggedTensor.from_row_lengths(ids, lengths)  # pyright: ignore[reportAttributeAccessIssue]

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda ids: self.tokenizer.decode(ids.tolist()).encode(), [ids], tf.string)


def register(
    tasks: Sequence[PlannedTask],
    tokenizer: Tokenizer,
    splits: Sequence[Split],
    rejects: dict[tuple[str, str], Rejects],
) -> seqio.Mixture:
    """Declares each task in seqio's registry, and the mixture of all.

    Args:
        tasks: the tasks.
        tokenizer: of all of them.
        splits: their sides.
        rejects: (task, split) -> who is told of what cannot be used.

    Returns:
        The mixture `pippin_mixture` of tasks `pippin_<name>`. Their examples are several parts of
        documents: "targets" [parts, ids] int32, ragged, and "starts" and "ends" [parts] bool.
    """
    vocabulary = TokenizerVocabulary(tokenizer)
    rates = []
    for task in tasks:
        name = f"pippin_{task.name}"
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        sides = {split.name: split for split in splits}
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(  # pyright: ignore[reportArgumentType]
                _dataset_fn(task, sides, rejects), splits=list(sides)
            ),
            preprocessors=[functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)],
            output_features={"targets": seqio.Feature(vocabulary, add_eos=False, rank=2)},
        )
        rates.append((name, task.rate))
    if "pippin_mixture" in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove("pippin_mixture")
    return seqio.MixtureRegistry.add("pippin_mixture", rates)


def _dataset_fn(
    task: PlannedTask, splits: dict[str, Split], rejects: dict[tuple[str, str], Rejects]
) -> Callable[..., tf.data.Dataset]:
    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        # Files come in the order of their hashes, and rows are shuffled when they are read.
        del shuffle_files, seed

        def groups() -> Iterator[dict[str, list[Any]]]:
            told = rejects[task.name, split]
            try:
                for group in _groups(task.source.parts(task.files, splits[split], told)):
                    yield {
                        "targets": [part.text for part in group],
                        "starts": [part.starts for part in group],
                        "ends": [part.ends for part in group],
                    }
            except PippinError as e:
                told.failure = e  # TensorFlow would turn it into an error of its own

        flags = tf.TensorSpec((None,), tf.bool)
        signature = {"targets": tf.TensorSpec((None,), tf.string), "starts": flags, "ends": flags}
        return tf.data.Dataset.from_generator(groups, output_signature=signature)

    return dataset


def _groups(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Consecutive parts together, up to so many or so long."""
    group, size = list[Part](), 0
    for part in parts:
        group.append(part)
        size += len(part.text)
        if len(group) == _GROUP or size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def pack(
    stores: Sequence[PlannedStore],
    tokenizer: Tokenizer,
    *,
    fatal: bool,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Fills stores, shard after shard in turns, so that all soon have the first rows.

    Args:
        stores: none of them complete; no other process fills them.
        tokenizer: of all tasks.
        fatal: whether input that cannot be used is an error.
        begun: called when each store has its first shard.

    Raises:
        DataError: such input, where it is fatal.
    """
    rejects = {}
    for store in stores:
        store.directory.mkdir(parents=True, exist_ok=True)
        rejects[store.task.name, store.split.name] = Rejects(fatal=fatal, listing=store.rejected_file)
    tasks = {store.task.name: store.task for store in stores}
    splits = {store.split.name: store.split for store in stores}
    mixture = register(list(tasks.values()), tokenizer, list(splits.values()), rejects)
    by_name = {task.name: task for task in mixture.tasks}
    shards = [
        _pack_store(
            store, by_name[f"pippin_{store.task.name}"], tokenizer, rejects[store.task.name, store.split.name]
        )
        for store in stores
    ]
    shards = [shard for shard in shards if next(shard, _END) is not _END]
    begun()
    while shards:
        shards = [shard for shard in shards if next(shard, _END) is not _END]


def _pack_store(
    store: PlannedStore, task: seqio.Task, tokenizer: Tokenizer, rejects: Rejects
) -> Iterator[None]:
    """Fills a store, and stops after each shard."""
    length = store.sequence_length
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    packer = Packer(length, start, tokenizer.eos_id, tokenizer.pad_id)
    writer = StoreWriter(store.directory, length, tokenizer.vocab_size)
    for row in _packed(packer, task, store.split, rejects):
        if writer.add(row, rejects.report):
            yield
        if writer.rows == store.max_rows:
            break
    writer.finish(rejects.report)
    rejects.close()


def _packed(packer: Packer, task: seqio.Task, split: Split, rejects: Rejects) -> Iterator[np.ndarray]:
    dataset = task.get_dataset(None, split.name, shuffle=False, trim_output_features=False)
    for example in dataset.as_numpy_iterator():
        for ids, starts, ends in zip(example["targets"], example["starts"], example["ends"], strict=True):
            yield from packer.add(ids, starts=bool(starts), ends=bool(ends))
    if rejects.failure:
        raise rejects.failure
    yield from packer.flush()
