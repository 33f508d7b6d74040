"""The configs of the learner, its optimizers, schedules and rules. No JAX."""

from __future__ import annotations

from typing import Annotated, Any

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError


def _require(cfg: Config, name: str, holds: bool, rule: str) -> None:
    if not holds:
        got: Any = getattr(cfg, name)
        raise ConfigError(f"{type(cfg).__name__}.{name} got {got!r}. It must be {rule}.")


class ConstantScheduleConfig(
    Config, implementation="pippin.train.learner.schedule:ConstantSchedule", provides="schedule"
):
    """A linear warm-up to 1, then 1."""

    warmup_steps: int = 0

    def validate(self) -> None:
        _require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")


class DecayScheduleConfig(Config):
    """What schedules that decay share: a linear warm-up to 1, then a decay to the final ratio."""

    warmup_steps: int = 0
    final_ratio: float = 0.0  # of the peak
    end_step: int | None = None  # the update that reaches the final ratio; None: the run's last

    def validate(self) -> None:
        _require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        _require(self, "final_ratio", 0 <= self.final_ratio <= 1, "from 0 to 1")
        _require(self, "end_step", self.end_step is None or self.end_step > 0, "positive")


class CosineScheduleConfig(
    DecayScheduleConfig, implementation="pippin.train.learner.schedule:CosineSchedule", provides="schedule"
):
    """A linear warm-up to 1, then half a cosine down to the final ratio."""


class LinearScheduleConfig(
    DecayScheduleConfig, implementation="pippin.train.learner.schedule:LinearSchedule", provides="schedule"
):
    """A linear warm-up to 1, then a straight line down to the final ratio."""


class AdamWConfig(Config, implementation="pippin.train.learner.optimizer:AdamW", provides="optimizer"):
    """Adam with decoupled weight decay: the decay is times the learning rate and the schedule.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def validate(self) -> None:
        _require(self, "beta1", 0 <= self.beta1 < 1, "at least 0 and below 1")
        _require(self, "beta2", 0 <= self.beta2 < 1, "at least 0 and below 1")
        _require(self, "eps", self.eps > 0, "positive")
        _require(self, "weight_decay", self.weight_decay >= 0, "0 or more")


class AfmOptimizerConfig(
    Config, implementation="pippin.train.learner.optimizer:AfmOptimizer", provides="optimizer"
):
    """RMSProp with momentum, updates of bounded RMS, and a decay that is times the schedule alone.

    Source: Apple 2024, arXiv:2407.21075, pre-training recipe.
    """

    momentum_decay: float = 0.95
    square_decay: float = 0.95
    square_eps: float = 1e-30  # added to the squared gradient
    max_update_rms: float = 1.0  # of each block: a parameter, or one layer's slice of a stacked parameter
    weight_decay: float = 3.16e-4

    def validate(self) -> None:
        _require(self, "momentum_decay", 0 <= self.momentum_decay < 1, "at least 0 and below 1")
        _require(self, "square_decay", 0 <= self.square_decay < 1, "at least 0 and below 1")
        _require(self, "square_eps", self.square_eps > 0, "positive")
        _require(self, "max_update_rms", self.max_update_rms > 0, "positive")
        _require(self, "weight_decay", self.weight_decay >= 0, "0 or more")


class RuleConfig(Config):
    """How the parameters of a kind of component are treated, unlike the others.

    The last rule of a learner that matches a parameter is the one that counts.
    """

    # An interface such as "norm", or a component type such as "pippin.layers.Linear".
    component: Required[str] = REQUIRED
    # Only what such a component holds itself, not what the components inside it hold.
    direct: bool = False
    lr_scale: float = 1.0  # times the part of an update that follows the gradient
    weight_decay_scale: float = 1.0  # times the part that decays the parameter
    frozen: bool = False  # no update and no optimizer state

    def validate(self) -> None:
        _require(self, "lr_scale", self.lr_scale >= 0, "0 or more")
        _require(self, "weight_decay_scale", self.weight_decay_scale >= 0, "0 or more")
        if self.frozen and not self.lr_scale == self.weight_decay_scale == 1:
            raise ConfigError(
                f"RuleConfig for {self.component!r} is frozen and has lr_scale {self.lr_scale} and "
                f"weight_decay_scale {self.weight_decay_scale}: a frozen parameter has no update to scale. "
                "Leave out either frozen or the scales."
            )


class MuPConfig(Config):
    """Simple muP: the matrices of attention and feed-forward learn at `base_dim / model_dim` times the rate.

    The best learning rate of a model of `base_dim` is then that of a wider one. The decay is not scaled.
    Source: Wortsman et al. 2023, arXiv:2309.14322 (there "muParam (simple)"), as used by Apple 2024,
    arXiv:2407.21075.
    """

    base_dim: int = 768
    model_dim: int | None = None  # None: the dim beside the vocabulary's, as in the embedding
    components: tuple[str, ...] = ("attention", "feed_forward")  # as RuleConfig.component

    def validate(self) -> None:
        _require(self, "base_dim", self.base_dim > 0, "positive")
        _require(self, "model_dim", self.model_dim is None or self.model_dim > 0, "positive")


class LearnerConfig(Config, implementation="pippin.train.learner.learner:Learner", provides="learner"):
    """Gradients to parameters: clip or skip by the global norm, then the optimizer at its schedule."""

    learning_rate: Required[float] = REQUIRED  # the peak: the schedule is a ratio of it
    optimizer: Annotated[Config, Slot("optimizer")] = AdamWConfig()
    schedule: Annotated[Config, Slot("schedule")] = CosineScheduleConfig()
    rules: tuple[RuleConfig, ...] = ()
    mup: MuPConfig | None = None
    clip_norm: float | None = 1.0  # gradients of a larger global norm are scaled down to it
    skip_norm: float | None = 100.0  # a norm this large skips the step; None: only a non-finite one does
    max_consecutive_skips: int = 20  # more end the run: it has diverged
    ema_decay: float | None = None  # of the averaged parameters; None: there are none
    microbatches: int = 1  # that a batch is split into, one after the other, to save memory

    def validate(self) -> None:
        rate = self.learning_rate
        _require(self, "learning_rate", rate is REQUIRED or rate >= 0, "0 or more")
        _require(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive, or None")
        _require(self, "skip_norm", self.skip_norm is None or self.skip_norm > 0, "positive, or None")
        _require(self, "max_consecutive_skips", self.max_consecutive_skips >= 0, "0 or more")
        _require(
            self,
            "ema_decay",
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            "at least 0 and below 1, or None",
        )
        _require(self, "microbatches", self.microbatches >= 1, "1 or more")
