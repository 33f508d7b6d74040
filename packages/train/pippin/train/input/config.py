"""The configs of input: what text, how it is tokenised and packed, and in which order it comes."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.config_tree import replace
from pippin.core.errors import ConfigError


class BadInput(StrEnum):
    """What happens to text that cannot be used. Either way it is named and counted."""

    SKIP = "skip"
    FATAL = "fatal"


class StdlibConfig(Config, implementation="pippin.train.input.sources:StdlibSource", provides="text_source"):
    """The Python source of the standard library of the interpreter that runs, one document a file."""

    include_tests: bool = False


class FilesConfig(Config, implementation="pippin.train.input.sources:FilesSource", provides="text_source"):
    """Files that match a pattern: .txt, .jsonl, .jsonl.gz or .parquet."""

    glob: Required[str] = REQUIRED  # ** matches any number of directories
    text_field: str = "text"  # of a JSON object or a parquet row


class TaskConfig(Config):
    """One source of text in a mixture."""

    name: Required[str] = REQUIRED
    source: Annotated[Config, Slot("text_source")] = StdlibConfig()
    rate: float = 1.0  # of the rows of a mixture, relative to the rates of the other tasks

    def validate(self) -> None:
        if self.name is not REQUIRED and not re.fullmatch(r"\w+", self.name, re.ASCII):
            raise ConfigError(
                f"TaskConfig.name got {self.name!r}. Use letters, digits and underscores alone."
            )
        if not self.rate > 0:
            raise ConfigError(
                f"TaskConfig.rate of {self.name!r} is {self.rate}. Give it a rate above 0, or remove it."
            )


class MixtureConfig(Config):
    """Tasks and how many of the rows come from each."""

    tasks: tuple[TaskConfig, ...] = (TaskConfig(name="stdlib"),)

    def validate(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"MixtureConfig.tasks are named {names}. Give it one task or more, each its own name."
            )


class SentencePieceConfig(
    Config,
    implementation="pippin.train.input.tokenizer_training:SentencePieceTraining",
    provides="tokenizer_source",
):
    """A byte-pair encoding trained on the training files, with split digits, byte fallback and no normalisation.

    Source: the tokenizer of AFM, arXiv:2407.21075, section 2.
    """

    vocab_size: int = 4096  # text that is too short for as many gives fewer
    character_coverage: float = (
        0.9995  # the share of characters that get a piece of their own; others are bytes
    )
    split_by_script: bool = True  # no piece mixes letters with punctuation
    training_bytes: int = 16 * 1024 * 1024  # the text is cut off after these


class TokenizerFilesConfig(
    Config, implementation="pippin.train.input.tokenizer_training:TokenizerFiles", provides="tokenizer_source"
):
    """A tokenizer that exists: a directory with tokenizer.json or tokenizer.model."""

    directory: Required[str] = REQUIRED


class TextInputConfig(Config, implementation="pippin.train.input.text_input:TextInput", provides="input"):
    """Batches of packed rows from a mixture of texts."""

    mixture: MixtureConfig = MixtureConfig()
    tokenizer: Annotated[Config, Slot("tokenizer_source")] = SentencePieceConfig()
    batch_size: Required[int] = REQUIRED  # rows of a global batch, of all processes together
    sequence_length: Required[int] = REQUIRED  # tokens of a row
    seed: int = 0  # of the order of the rows
    heldout_every: int = 20  # one in so many files, rows or blocks of text is never trained on
    heldout_rows: int | None = 1024  # packed rows of a task that are kept for evaluation, at most
    bad_input: BadInput = BadInput.SKIP
    prefetch: int = 4  # batches ready before they are asked for

    def validate(self) -> None:
        for name, least in (("batch_size", 1), ("sequence_length", 2), ("heldout_every", 2), ("prefetch", 1)):
            value = getattr(self, name)
            if value is not REQUIRED and value < least:
                raise ConfigError(f"TextInputConfig.{name} is {value}. Set it to {least} or more.")
        if self.sequence_length is not REQUIRED and self.sequence_length > 65535:
            raise ConfigError(
                f"TextInputConfig.sequence_length is {self.sequence_length}. Packed rows have at most 65535 tokens."
            )


def use_files(glob: str, text_field: str = "text") -> Callable[[Config], Config]:
    """The modifier that trains on files of one's own instead of on the mixture of a config tree."""
    own = TaskConfig(name="files", source=FilesConfig(glob=glob, text_field=text_field))
    return lambda cfg: replace(cfg, MixtureConfig, MixtureConfig(tasks=(own,)))
