"""The report's targets on a reduced scale; and that its counters count, so that a zero says something."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from pippin.core.config_tree import replace, traverse
from pippin.layers import stack
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.moe_config import MoEConfig
from pippin.layers.position_config import ALiBiConfig, NoPEConfig, RoPEConfig
from tests.complexity import experiment, lines, modifiers
from tests.complexity.features import FEATURES, Feature, FeatureError, experts_act, integrate, position_acts
from tests.complexity.runs import build_abstract
from tests.complexity.user_features import LogDistance
from tests.complexity.variants import ATTENTIONS, MODELS, diagonal, grid, random_models

BASE = MODELS["base"](ATTENTIONS["grouped_query"])


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """What a quick run of the report prints, and the folder that it writes."""
    out = tmp_path_factory.mktemp("report")
    # In a process of its own: it imports a copy of the packages, made for it.
    command = [sys.executable, "-m", "tests.complexity.report", "--quick", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


@pytest.fixture(scope="module")
def features(reported):
    """The results of each feature."""
    return json.loads((reported[1] / "results.json").read_text())["features"]


def test_no_existing_line_changes_and_modifiers_have_at_most_ten(features):
    assert [f["name"] for f in features] == ["RoPE", "MoE", "LogDistance", "SharedExpertMoE"]
    for feature in features:
        assert feature["change"] == {"lines": {}, "functions": []}
        assert [point["changed_lines"] for point in feature["sweep"]] == [0, 0, 0]
        assert 0 < len(feature["modifier"]) <= 10
        assert (feature["composed"], feature["built"], feature["ran"]) == (200, 10, 2)


def test_no_existing_module_names_the_features_of_a_user(features):
    users = [f for f in features if f["from_user"]]
    assert len(users) == 2
    assert all(f["mentions"] == {} and f["holders"] == [] for f in users)


def test_the_report_is_written(reported):
    printed, out = reported
    assert re.search(r"^AXLearn +O\(1\) +0 +O\(1\) +0$", printed, re.MULTILINE)
    assert re.search(r"^pippin, measured +O\(1\) +0 +O\(1\) +0$", printed, re.MULTILINE)
    assert (out / "complexity.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    for text in ("Megatron-LM", "pippin, measured", "def with_rope", "existing module", "data:image/png"):
        assert text in page


def test_the_grid_is_20_by_10_different_configs_without_the_features():
    models = grid()
    assert len(MODELS) == 20 and len(ATTENTIONS) == 10 and len(set(models.values())) == 200
    kinds = {type(cfg) for model in models.values() for _, cfg in traverse(model)}
    assert not kinds & {RoPEConfig, ALiBiConfig, LogDistance.Config, MoEConfig}


def test_the_diagonal_holds_every_variant():
    models, attentions = zip(*diagonal(), strict=True)
    assert set(models) == set(MODELS) and set(attentions) == set(ATTENTIONS)


def test_random_models_differ_and_are_the_same_for_the_same_seed():
    assert random_models(50, seed=1) == random_models(50, seed=1)
    assert random_models(50, seed=1) != random_models(50, seed=2)
    assert len(set(random_models(50, seed=1))) == 50


@pytest.fixture
def package(tmp_path):
    """A copy of the layers, to be edited."""
    folder = tmp_path / "layers"
    shutil.copytree(stack.__file__.rpartition("/")[0], folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_line_that_changes_counts_twice_and_a_new_one_once(package):
    before = lines.read_folder(package)
    path = package / "feed_forward.py"
    path.write_text("import this\n" + path.read_text().replace("hidden = self", "hidden = 2 * self"))
    (package / "new.py").write_text("one = 1\ntwo = 2\n")
    assert lines.changed_lines(before, lines.read_folder(package)) == {"feed_forward.py": 3, "new.py": 2}


def test_a_method_patched_at_run_time_counts(monkeypatch):
    before = lines.loaded_functions()
    assert lines.changed_functions(before, lines.loaded_functions()) == []
    monkeypatch.setattr(stack.TransformerLayer, "__call__", lambda self, x, ctx, cache=None: x)
    monkeypatch.setattr(stack, "Sequence", stack.Repeat)
    changed = lines.changed_functions(before, lines.loaded_functions())
    assert "pippin.layers.stack:TransformerLayer.__call__" in changed
    assert "pippin.layers.stack:Sequence" in changed


def test_a_changed_line_misses_the_target(features):
    (result,) = [r for r in features if r["name"] == "LogDistance"]
    result = experiment.FeatureResult(
        **result | {"change": experiment.Change({}, []), "sweep": [experiment.Point(1, 1, 0, 0.1)]}
    )
    assert result.meets_target
    for missed in (
        {"change": experiment.Change({"pippin/layers/attention.py": 2}, [])},
        {"change": experiment.Change({}, ["pippin.layers.stack:Repeat"])},
        {"sweep": [experiment.Point(1, 1, 2, 0.1)]},
        {"modifier": ["a line"] * 11},
        {"mentions": {"pippin/layers/stack.py": 1}},
        {"holders": ["pippin.layers.stack"]},
    ):
        assert not dataclasses.replace(result, **missed).meets_target


def test_modifier_lines_are_its_code_and_its_imports():
    assert lines.modifier_lines(modifiers.with_rope) == [
        "from pippin.core.config_tree import replace",
        "from pippin.layers.causal_lm_config import CausalLMConfig",
        "from pippin.layers.position_config import NoPEConfig, RoPEConfig",
        "def with_rope(cfg: CausalLMConfig) -> CausalLMConfig:",
        "    return replace(cfg, NoPEConfig, RoPEConfig(theta=10_000.0))",
    ]


def _hidden(cfg):
    return replace(cfg, NoPEConfig, RoPEConfig())


def _hiding(cfg):
    """Does its work elsewhere."""
    # A helper does not make a modifier shorter.

    return _hidden(cfg)


def test_modifier_lines_include_the_helpers_that_it_calls():
    counted = lines.modifier_lines(_hiding)
    assert "    return replace(cfg, NoPEConfig, RoPEConfig())" in counted and len(counted) == 6


def test_mentions_are_lines_of_code_and_not_of_comments():
    text = '"""Of LogDistance."""\n# LogDistance\nx = LogDistance()\nkind = "LogDistance"\n'
    assert lines.mentions(LogDistance, {"pippin/layers/stack.py": text}) == {"pippin/layers/stack.py": 2}


def _feature(modifier, replaces, adds, acts):
    return Feature("Odd", modifier, replaces, adds, acts, from_user=True)


def test_a_modifier_that_changes_more_than_its_feature_is_refused():
    def modifier(cfg):
        return modifiers.with_rope(cfg).set(logit_soft_cap=5.0)

    with pytest.raises(FeatureError, match="changed logit_soft_cap as well"):
        integrate(_feature(modifier, NoPEConfig, RoPEConfig, position_acts), BASE)


def test_a_modifier_that_leaves_a_layer_out_is_refused():
    with pytest.raises(FeatureError, match="not integrated at decoder.layer.attention.position"):
        integrate(_feature(lambda cfg: cfg, NoPEConfig, RoPEConfig, position_acts), BASE)


def test_a_position_encoding_that_does_nothing_is_refused():
    def modifier(cfg):
        return replace(cfg, NoPEConfig, LogDistance.Config(scale=0.0))

    feature = _feature(modifier, NoPEConfig, LogDistance.Config, position_acts)
    with pytest.raises(FeatureError, match="changes the logits by 0 only"):
        feature.acts(feature, BASE, modifier(BASE))


def test_a_feed_forward_without_experts_is_refused():
    def modifier(cfg):
        return replace(cfg, FeedForwardConfig, lambda old: old.set(activation=Activation.RELU))

    feature = _feature(modifier, FeedForwardConfig, FeedForwardConfig, experts_act)
    with pytest.raises(FeatureError, match="reports the router losses {}"):
        feature.acts(feature, BASE, modifier(BASE))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_features_compose(attention):
    cfg = MODELS["tracks_between_layers"](ATTENTIONS[attention])
    for feature in FEATURES[:2]:
        cfg, _ = integrate(feature, cfg)
    build_abstract(cfg)
