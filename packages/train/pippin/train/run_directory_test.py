from pathlib import Path

import pytest

from pippin.core.component import from_text
from pippin.core.config_tree import override
from pippin.core.errors import ConfigError
from pippin.train.hardware.mesh_rules_config import MeshRuleConfig
from pippin.train.run_directory import RunDirectory
from pippin.train.toy import toy_config


def test_the_first_claim_makes_the_directory_and_the_next_finds_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    assert not run.claim(toy_config())
    assert run.claim(toy_config())


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim(toy_config())
    (run.checkpoints / "4").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"learner.learning_rate: 0.01 -> 0.5(.|\n)*another --out"):
        run.claim(override(toy_config(), {"learner.learning_rate": 0.5}))


def test_a_directory_where_nothing_was_trained_takes_another_config(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim(toy_config())
    other = override(toy_config(), {"learner.learning_rate": 0.5})
    assert not run.claim(other)
    assert run.claim(other)


def test_a_run_goes_on_with_another_mesh_and_other_rules_for_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim(toy_config())
    run.tokenizer.mkdir()
    (run.checkpoints / "4").mkdir(parents=True)
    moved = override(toy_config(), {"mesh.fsdp": 2}).set(mesh_rules=(MeshRuleConfig(accelerators="cpu-*"),))
    assert run.claimed_by(moved) and run.claim(moved)
    assert from_text(run.config.read_text()) == moved


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim(toy_config())
    run.config.write_text("damaged")
    with pytest.raises(ConfigError, match=r"trainer\.textproto cannot be read"):
        run.claim(toy_config())


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        RunDirectory(tmp_path).claim(toy_config())


def test_metrics_of_steps_that_will_be_done_again_are_dropped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step":')
    run.trim_metrics(2)
    assert [m["step"] for m in run.read_metrics()] == [1, 2]
