"""Tests of the learner's configs."""

import subprocess
import sys

import pytest

from pippin.core.component import from_text, to_text
from pippin.core.config_tree import override
from pippin.core.errors import ConfigError
from pippin.train.learner.config import (
    AdamWConfig,
    AfmOptimizerConfig,
    ConstantScheduleConfig,
    CosineScheduleConfig,
    LearnerConfig,
    LinearScheduleConfig,
    MuPConfig,
    RuleConfig,
)


def _afm() -> LearnerConfig:
    return LearnerConfig(
        learning_rate=0.01,
        optimizer=AfmOptimizerConfig(),
        schedule=CosineScheduleConfig(warmup_steps=5000, final_ratio=0.005),
        rules=(RuleConfig(component="norm", weight_decay_scale=0.0),),
        mup=MuPConfig(),
    )


def test_configs_import_neither_jax_nor_optax():
    program = (
        "import sys, pippin.train.learner.config\n"
        "print([m for m in ('jax', 'flax', 'optax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_learner_survives_its_textproto():
    assert from_text(to_text(_afm())) == _afm()


def test_a_learner_can_be_changed_by_text():
    cfg = override(
        _afm(),
        {
            "optimizer": "AdamW",
            "optimizer.weight_decay": "0.2",
            "schedule": "LinearSchedule",
            "rules.0.weight_decay_scale": "1",
            "rules.0.frozen": "true",
            "clip_norm": "none",
        },
    )
    assert cfg.optimizer == AdamWConfig(weight_decay=0.2)
    # A slot's new component keeps the fields that the old one has too.
    assert cfg.schedule == LinearScheduleConfig(warmup_steps=5000, final_ratio=0.005)
    assert cfg.rules == (RuleConfig(component="norm", frozen=True),)
    assert cfg.clip_norm is None


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: LearnerConfig(learning_rate=-1.0), r"learning_rate got -1.0. It must be 0 or more"),
        (lambda: LearnerConfig(clip_norm=0.0), r"clip_norm got 0.0. It must be positive, or None"),
        (lambda: LearnerConfig(skip_norm=0.0), r"skip_norm got 0.0. It must be positive, or None"),
        (lambda: LearnerConfig(ema_decay=1.0), r"ema_decay got 1.0. It must be at least 0 and below 1"),
        (lambda: LearnerConfig(microbatches=0), r"microbatches got 0. It must be 1 or more"),
        (
            lambda: LearnerConfig(optimizer=ConstantScheduleConfig()),
            r"provides 'schedule'.*pippin.train.AdamW",
        ),
        (lambda: CosineScheduleConfig(final_ratio=1.5), r"final_ratio got 1.5. It must be from 0 to 1"),
        (lambda: AfmOptimizerConfig(square_decay=1.0), r"square_decay got 1.0"),
        (lambda: RuleConfig(component="norm", frozen=True, lr_scale=0.5), r"no update to scale.*Leave out"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_rule(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_a_learner_without_a_learning_rate_is_not_built():
    with pytest.raises(ConfigError, match="learning_rate of LearnerConfig is required"):
        LearnerConfig().build(infos={})
