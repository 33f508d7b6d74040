"""Tests of which rule counts for which parameter."""

import pytest

from pippin.core.errors import ConfigError
from pippin.core.module import unflatten_params
from pippin.train.learner import toy
from pippin.train.learner.config import LearnerConfig, MuPConfig, RuleConfig
from pippin.train.learner.rules import describe_rules, resolve


def _learner(*rules: RuleConfig, mup: MuPConfig | None = None) -> LearnerConfig:
    return LearnerConfig(learning_rate=0.1, rules=rules, mup=mup)


def test_a_rule_matches_by_interface_wherever_the_component_lies():
    treatments = resolve(_learner(RuleConfig(component="norm", weight_decay_scale=0.0)), toy.infos())
    undecayed = {path for path, t in treatments.items() if t.weight_decay_scale == 0}
    assert undecayed == {"layers.attention.q_norm.scale", "norm.scale"}


def test_a_rule_matches_by_type_what_lies_inside_unless_it_is_direct():
    inside = resolve(_learner(RuleConfig(component="pippin.toy.Attention", lr_scale=0.5)), toy.infos())
    assert {p for p, t in inside.items() if t.lr_scale == 0.5} == {
        "layers.attention.q.weight",
        "layers.attention.q_norm.scale",
    }
    with pytest.raises(ConfigError, match="No parameter lies directly in such a component"):
        resolve(_learner(RuleConfig(component="pippin.toy.Attention", direct=True)), toy.infos())


def test_the_last_rule_that_matches_counts_alone():
    rules = (
        RuleConfig(component="norm", weight_decay_scale=0.0),
        RuleConfig(component="attention", lr_scale=0.5),
    )
    treatments = resolve(_learner(*rules), toy.infos())
    both = treatments["layers.attention.q_norm.scale"]
    assert (both.rule, both.lr_scale, both.weight_decay_scale) == (1, 0.5, 1.0)
    assert treatments["norm.scale"].rule == 0


def test_a_general_freeze_with_an_exception_trains_the_exception():
    rules = (RuleConfig(component="causal_lm", frozen=True), RuleConfig(component="norm"))
    treatments = resolve(_learner(*rules), toy.infos())
    assert {p for p, t in treatments.items() if not t.frozen} == {
        "layers.attention.q_norm.scale",
        "norm.scale",
    }


def test_a_rule_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(
        ConfigError, match=r"rules.0 is for 'nrom' .did you mean 'norm'.*feed_forward.*toy.Linear"
    ):
        resolve(_learner(RuleConfig(component="nrom")), toy.infos())


def test_a_rule_without_effect_is_refused():
    rules = (RuleConfig(component="norm", frozen=True), RuleConfig(component="causal_lm", lr_scale=0.5))
    with pytest.raises(ConfigError, match="rules.0 for 'norm' has no effect.*Put general rules first"):
        resolve(_learner(*rules), toy.infos())


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="freeze all 6 parameters"):
        resolve(_learner(RuleConfig(component="causal_lm", frozen=True)), toy.infos())


def test_mup_slows_the_matrices_of_attention_and_feed_forward_alone():
    treatments = resolve(_learner(mup=MuPConfig(base_dim=1)), toy.infos())
    slowed = {path: t.lr_scale for path, t in treatments.items() if t.lr_scale != 1}
    assert slowed == {"layers.attention.q.weight": 0.25, "layers.mlp.up.weight": 0.25}
    assert all(t.weight_decay_scale == 1 for t in treatments.values())


def test_mup_of_the_afm_on_device_model_is_a_quarter():
    treatments = resolve(_learner(mup=MuPConfig(model_dim=3072)), toy.infos())
    assert treatments["layers.mlp.up.weight"].lr_scale == 0.25


def test_mup_and_a_rule_multiply():
    rule = RuleConfig(component="attention", lr_scale=0.5)
    assert (
        resolve(_learner(rule, mup=MuPConfig(base_dim=1)), toy.infos())["layers.attention.q.weight"].lr_scale
        == 0.125
    )


def test_mup_without_a_model_dim_or_a_component_is_refused():
    matrix = toy.info("mlp.weight", (4, 6), ("input", "mlp"), "feed_forward")
    infos = unflatten_params({"mlp.weight": matrix})
    with pytest.raises(ConfigError, match="mup.components is for 'attention'"):
        resolve(_learner(mup=MuPConfig()), infos)
    with pytest.raises(
        ConfigError, match="found none. There must be exactly one such dim. Set mup.model_dim"
    ):
        resolve(_learner(mup=MuPConfig(components=("feed_forward",))), infos)


def test_describe_counts_what_each_rule_covers():
    rules = (
        RuleConfig(component="norm", weight_decay_scale=0.0),
        RuleConfig(component="embedding", direct=True, frozen=True),
    )
    assert describe_rules(_learner(*rules, mup=MuPConfig(base_dim=1)), toy.infos()) == (
        "all: 6 parameters, 182 elements\n"
        "rules.0 (norm, weight_decay_scale 0): 2 parameters, 16 elements\n"
        "rules.1 (embedding, direct, frozen): 1 parameters, 28 elements\n"
        "no rule: 3 parameters, 138 elements\n"
        "muP (lr_scale 0.25): 2 parameters, 120 elements\n"
        "frozen: 1 parameters, 28 elements\n"
    )
