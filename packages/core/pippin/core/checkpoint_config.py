"""The config of checkpoints."""

from __future__ import annotations

from pippin.core.config import Config
from pippin.core.errors import ConfigError


class CheckpointerConfig(
    Config, implementation="pippin.core.checkpoint:Checkpointer", provides="checkpointer"
):
    """When the training state is saved, and which saves are kept."""

    every_steps: int = 1000
    keep_last: int = 3  # the newest so many are kept
    keep_every_steps: int | None = None  # and, for good, those of every so many steps
    timeout_s: float = 1800.0  # how long a process waits for the others' part of a save

    def validate(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every_steps", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"CheckpointerConfig.{name} got {value!r}; it must be above 0. Give it such a number."
                )
