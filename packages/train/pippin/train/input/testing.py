"""Small texts and a tokenizer that can be worked out by hand, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pippin.core.tokenizer import load_tokenizer
from pippin.train.input.config import (
    FilesConfig,
    MixtureConfig,
    TaskConfig,
    TextInputConfig,
    TokenizerFilesConfig,
)
from pippin.train.input.packing import Packer
from pippin.train.input.plan import PlannedStore
from pippin.train.input.rejects import Rejects
from pippin.train.input.store import StoreWriter

LETTERS = "abcdefghijklmnopqrstuvwxyz \n"  # ids from 2; <s> is 0 and </s> is 1


def write_letter_tokenizer(directory: Path) -> Path:
    """A tokenizer of one token a letter: "a" is 2, "b" is 3, and so on; <s> is 0, </s> is 1."""
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return directory


def write_rows(path: Path, texts: list[str]) -> Path:
    """A .jsonl file of some texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def input_config(directory: Path, globs: dict[str, str], **fields: object) -> TextInputConfig:
    """The config of an input over files of `directory`, which gets a letter tokenizer.

    Args:
        directory: holds the files.
        globs: task -> pattern, relative to the directory.
        **fields: of the config.
    """
    tokenizer = write_letter_tokenizer(directory / "letters")
    tasks = tuple(
        TaskConfig(name=name, source=FilesConfig(glob=str(directory / pattern)))
        for name, pattern in globs.items()
    )
    cfg = TextInputConfig(
        mixture=MixtureConfig(tasks=tasks),
        tokenizer=TokenizerFilesConfig(directory=str(tokenizer)),
        batch_size=2,
        sequence_length=4,
        heldout_every=3,
    )
    return cfg.set(**fields)


def reference_rows(store: PlannedStore, tokenizer_dir: Path, rejects: Rejects) -> Iterator[np.ndarray]:
    """The packed rows of a store, made without seqio: what the pipeline must make too."""
    tokenizer = load_tokenizer(tokenizer_dir)
    packer = Packer(store.sequence_length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    for part in store.task.source.parts(store.task.files, store.split, rejects):
        yield from packer.add(tokenizer.encode(part.text), starts=part.starts, ends=part.ends)
    yield from packer.flush()


def fill(store: PlannedStore, tokenizer_dir: Path) -> None:
    """Fills a store without seqio and without a process of its own."""
    tokenizer, rejects = load_tokenizer(tokenizer_dir), Rejects()
    writer = StoreWriter(store.directory, store.sequence_length, tokenizer.vocab_size)
    for row in reference_rows(store, tokenizer_dir, rejects):
        writer.add(row, rejects.report)
        if writer.rows == store.max_rows:
            break
    writer.finish(rejects.report)
