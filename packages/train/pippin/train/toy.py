"""A toy job for tests: a tiny model on an input that counts, without text and without TensorFlow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pippin.core.batch import Batch
from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.config import Config, Configurable
from pippin.core.errors import DataError
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.train.learner.config import CosineScheduleConfig, LearnerConfig
from pippin.train.trainer_config import PerplexityConfig, TrainerConfig


class CountingInput(Configurable):
    """Rows that count up from a number that is drawn for each, so that they can be learned."""

    class Config(Config, provides="input"):
        batch_size: int = 8
        sequence_length: int = 16
        vocab_size: int = 24
        seconds_a_batch: float = 0.0
        fails_at: int | None = None  # raises a DataError in place of this batch

    def __init__(
        self, cfg: Any, *, process_index: int = 0, process_count: int = 1, tokenizer_dir: Path | None = None
    ):
        self._cfg, self._next = cfg, 0
        self._share = process_index, process_count
        self.tokenizer, self.tokenizer_dir = self, tokenizer_dir or _write_tokenizer(cfg.vocab_size)
        self.vocab_size = cfg.vocab_size

    def __next__(self) -> Batch:
        self._next += 1
        time.sleep(self._cfg.seconds_a_batch)
        if self._next == self._cfg.fails_at:
            raise DataError("the toy input was told to fail")
        return self._batch(self._next)

    def state(self) -> bytes:
        return json.dumps({"next": self._next}).encode()

    def restore(self, state: bytes) -> None:
        self._next = json.loads(state)["next"]

    def close(self) -> None:
        pass

    task_names = ("counting",)

    def eval_batches(self, task: str) -> Iterator[Batch]:
        return (self._batch(10**6 + i) for i in range(2))

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return np.ones(vocab_size)

    def summary(self) -> list[Any]:
        return []

    def _batch(self, number: int) -> Batch:
        rows, length, vocab = self._cfg.batch_size, self._cfg.sequence_length, self._cfg.vocab_size
        start = np.random.default_rng(number).integers(0, vocab, (rows, 1))
        counted = ((start + np.arange(length + 1)) % vocab).astype(np.int32)
        index, count = self._share
        whole = {
            "tokens": counted[:, :-1],
            "targets": counted[:, 1:],
            "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "segment_ids": np.ones((rows, length), np.int32),
            "loss_weights": np.ones((rows, length), np.float32),
        }
        mine = slice(index * rows // count, (index + 1) * rows // count)
        return {name: value[mine] for name, value in whole.items()}  # type: ignore[return-value]


def toy_config(steps: int = 12, **input_fields: Any) -> TrainerConfig:
    """A job of a few seconds: a checkpoint every 4 steps, an evaluation every 6."""
    return TrainerConfig(
        model=afm_on_device_2024(
            vocab_size=24, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=32
        ),
        input=CountingInput.Config(**input_fields),
        learner=LearnerConfig(
            learning_rate=0.01, schedule=CosineScheduleConfig(warmup_steps=2), ema_decay=0.9
        ),
        evaluators=(PerplexityConfig(every_steps=6, max_batches=2),),
        checkpointer=CheckpointerConfig(every_steps=4, keep_last=2),
        steps=steps,
        log_every_steps=2,
    )


def _write_tokenizer(vocab_size: int) -> Path:
    """A tokenizer of one letter an id, in a new folder."""
    import tempfile

    import tokenizers

    folder = Path(tempfile.mkdtemp())
    vocabulary = {chr(ord("a") + i): i for i in range(vocab_size)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="a")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder
