"""The config of a training run: the root of the tree that recipes make."""

from __future__ import annotations

from typing import Annotated

from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError
from pippin.core.mesh_config import MeshConfig
from pippin.train.hardware.mesh_rules_config import MeshRuleConfig


class PerplexityConfig(Config, implementation="pippin.train.evaluator:Perplexity", provides="evaluator"):
    """The perplexity of held-out text."""

    name: str = "held_out"
    task: str | None = None  # of the input, whose held-out text it is; None: of all, batches of each in turn
    every_steps: int = 500
    max_batches: int = 16

    def validate(self) -> None:
        if self.every_steps < 1 or self.max_batches < 1:
            raise ConfigError(
                f"Perplexity {self.name}: every_steps ({self.every_steps}) and max_batches ({self.max_batches}) "
                "must be at least 1."
            )


class TrainerConfig(Config, implementation="pippin.train.trainer:Trainer", provides="trainer"):
    """A model, its input, how it learns, how it is measured and saved, and the mesh that it runs on."""

    model: Required[Annotated[Config, Slot("causal_lm")]] = REQUIRED
    input: Required[Annotated[Config, Slot("input")]] = REQUIRED
    learner: Required[Annotated[Config, Slot("learner")]] = REQUIRED
    evaluators: tuple[Annotated[Config, Slot("evaluator")], ...] = (PerplexityConfig(),)
    checkpointer: Annotated[Config, Slot("checkpointer")] = CheckpointerConfig()
    mesh: MeshConfig = MeshConfig()
    # What changes on which hardware; none: the config is for any, as it is.
    mesh_rules: tuple[MeshRuleConfig, ...] = ()
    steps: Required[int] = REQUIRED
    # A run, one of its steps, a bundle or a Hugging Face folder whose parameters are the first ones of this run; None: random ones.
    init_from: str | None = None
    seed: int = 0  # of the first parameters; the input has its own
    log_every_steps: int = 10

    def validate(self) -> None:
        if not self.evaluators:
            raise ConfigError(
                "Trainer: evaluators is empty, so a run could not say what it learned. Give it one."
            )
        for name in ("steps", "log_every_steps"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"Trainer: {name} ({value}) must be at least 1.")
