import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from pippin.core.bundle import open_model
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError, DataError
from pippin.layers.adapter import adapter_of, model_signature
from pippin.layers.linear_config import lora
from pippin.train.job import run_job
from pippin.train.learner.config import RuleConfig
from pippin.train.ledger import Bucket
from pippin.train.run_directory import RunDirectory
from pippin.train.summary import Summary
from pippin.train.toy import CountingInput, toy_config
from pippin.v1 import job_pb2 as pb

_PROGRAM = """
import sys
from pathlib import Path
from pippin.core.config_tree import override
from pippin.train.errors import Preempted
from pippin.train.job import run_job
from pippin.train.toy import CountingInput, toy_config
try:
    summary = run_job(toy_config(steps=12, seconds_a_batch=float(sys.argv[2])), Path(sys.argv[1]), "toy")
except Preempted as e:
    sys.exit(f"preempted: {e}")
print("fingerprint", summary.fingerprint)
"""


def start(out: Path, seconds_a_batch: float = 0.25) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM, str(out), str(seconds_a_batch)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, RunDirectory]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    # The wait for input is part of the config, and so the same as in the runs that are interrupted.
    return run_job(toy_config(steps=12, seconds_a_batch=0.25), out, "toy"), RunDirectory(out)


def test_a_run_learns_and_says_so(uninterrupted: tuple[Summary, RunDirectory]) -> None:
    summary, run = uninterrupted
    assert summary.trained < summary.untrained
    assert summary.unigram == pytest.approx(24)  # every letter is as frequent
    text = summary.text(run, 12)
    for path in (run.loss_plot, run.report, run.checkpoints / "12"):
        assert path.exists() and str(path) in text
    assert "data:image/png;base64," in run.report.read_text()
    assert any(run.tensorboard.iterdir())


def test_the_metrics_have_a_line_for_each_logged_step_and_evaluation(
    uninterrupted: tuple[Summary, RunDirectory],
) -> None:
    lines = uninterrupted[1].read_metrics()
    assert [m["step"] for m in lines if m["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [m["step"] for m in lines if m["kind"] == "held_out"] == [0, 6, 12]
    assert {"loss", "cross_entropy", "grad_norm", "learning_rate", "tokens_per_s"} <= lines[
        -1
    ].keys() | lines[-2].keys()


def test_the_ledger_adds_up_to_the_wall_time(uninterrupted: tuple[Summary, RunDirectory]) -> None:
    record = text_format.Parse(uninterrupted[1].record.read_text(), pb.RunRecord())
    assert record.outcome == pb.RUN_OUTCOME_COMPLETED
    assert sum(e.seconds for e in record.ledger.entries) == pytest.approx(record.ledger.wall_seconds)
    waited = next(e for e in record.ledger.entries if e.bucket == Bucket.GOODPUT_BUCKET_DATA)
    assert waited.seconds >= 12 * 0.25


@pytest.mark.parametrize("kill_after", [4, 8])
def test_a_run_that_is_killed_and_run_again_ends_as_if_it_had_not_been(
    uninterrupted: tuple[Summary, RunDirectory], tmp_path: Path, kill_after: int
) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for(out / "checkpoints" / str(kill_after) / "manifest.textproto", process)
    process.kill()
    process.communicate()
    again = start(out)
    printed, _ = again.communicate()
    assert again.returncode == 0, printed
    assert f"from the checkpoint of step {kill_after}" in printed
    assert f"fingerprint {uninterrupted[0].fingerprint}" in printed
    whole, resumed = uninterrupted[1].read_metrics(), RunDirectory(out).read_metrics()
    same = [[(m["kind"], m["step"], m.get("cross_entropy")) for m in lines] for lines in (whole, resumed)]
    assert same[0] == same[1]


def test_sigterm_saves_the_step_that_was_reached(
    uninterrupted: tuple[Summary, RunDirectory], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for(out / "checkpoints" / "4", process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    stopped = re.search(r"preempted: stopped by a signal after step (\d+)", printed)
    assert process.returncode == 1 and stopped, printed
    record = text_format.Parse(RunDirectory(out).record.read_text(), pb.RunRecord())
    assert record.outcome == pb.RUN_OUTCOME_PREEMPTED
    again = start(out)
    printed, _ = again.communicate()
    assert f"from the checkpoint of step {stopped[1]}" in printed
    assert f"fingerprint {uninterrupted[0].fingerprint}" in printed


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, out = toy_config(steps=8), tmp_path / "run"
    whole = run_job(cfg, out, "toy")
    weights = max(
        (out / "checkpoints" / "8" / "arrays").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()
    )
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert run_job(cfg, out, "toy").fingerprint == whole.fingerprint
    printed = capsys.readouterr().err
    assert "damaged checkpoint set aside: step 8" in printed
    assert "from the checkpoint of step 4" in printed


def test_a_run_starts_from_the_parameters_of_another(tmp_path: Path) -> None:
    first = run_job(toy_config(steps=12), tmp_path / "first", "toy")
    cfg = toy_config(steps=4).set(init_from=str(tmp_path / "first"))
    # The parameters of the run, which are not its averaged ones: so the perplexity is near, and not equal.
    assert run_job(cfg, tmp_path / "second", "toy").untrained < first.untrained / 2


def test_a_lora_starts_from_its_base_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    run_job(toy_config(steps=6), tmp_path / "base", "toy")
    base = open_model(tmp_path / "base")
    cfg = toy_config(steps=4)
    rules = (
        RuleConfig(component="causal_lm", frozen=True),
        RuleConfig(component="pippin.layers.LoRALinear", direct=True),
    )
    cfg = cfg.set(
        init_from=str(tmp_path / "base"), model=lora(rank=2)(cfg.model), learner=cfg.learner.set(rules=rules)
    )
    run_job(cfg, tmp_path / "tuned", "toy")
    maps, signature = adapter_of(open_model(tmp_path / "tuned"))
    assert signature == model_signature(base.params())
    assert all(np.any(pair.up) for pair in maps.values())


def test_a_start_from_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    run_job(toy_config(steps=1), tmp_path / "first", "toy")
    cfg = override(
        toy_config(steps=1),
        {"init_from": str(tmp_path / "first"), "model.decoder.layer.feed_forward.hidden_dim": 64},
    )
    with pytest.raises(ConfigError, match=r"another model: 3 parameters differ, such as .*feed_forward"):
        run_job(cfg, tmp_path / "second", "toy")


def test_an_input_that_fails_ends_the_run_with_its_error_and_keeps_what_was_saved(tmp_path: Path) -> None:
    cfg = toy_config(steps=12, fails_at=6)
    with pytest.raises(DataError, match="told to fail"):
        run_job(cfg, tmp_path / "run", "toy")
    assert open_model(tmp_path / "run").provenance.step == 4
    record = text_format.Parse(RunDirectory(tmp_path / "run").record.read_text(), pb.RunRecord())
    assert record.outcome == pb.RUN_OUTCOME_FAILED and "told to fail" in record.error


def test_a_model_with_fewer_vectors_than_the_tokenizer_has_ids_is_refused(tmp_path: Path) -> None:
    cfg = override(toy_config(), {"model.vocab_size": 8})
    with pytest.raises(ConfigError, match="the tokenizer has 24 ids, and model.vocab_size is 8"):
        run_job(cfg, tmp_path / "run", "toy")


def test_the_model_that_a_run_is_opened_as_is_the_one_that_it_measured(tmp_path: Path) -> None:
    cfg = toy_config(steps=4)  # its learner averages the parameters
    summary = run_job(cfg, tmp_path / "run", "toy")
    trainer = cfg.build(held_out=lambda most, task: CountingInput(cfg.input).eval_batches("counting"))
    measured = trainer.evaluators["held_out"](open_model(tmp_path / "run").params())
    assert measured["perplexity"] == pytest.approx(summary.trained, rel=1e-6)


def test_an_evaluator_of_a_task_that_the_input_has_not_is_refused(tmp_path: Path) -> None:
    cfg = override(toy_config(steps=1), {"evaluators.0.task": "poems"})
    with pytest.raises(ConfigError, match="got the task 'poems'; the input has"):
        run_job(cfg, tmp_path / "run", "toy")


def test_two_jobs_in_one_directory_are_refused(tmp_path: Path) -> None:
    cfg, run = toy_config(steps=1), RunDirectory(tmp_path / "run")
    run.claim(cfg)
    with (
        cfg.checkpointer.build(directory=run.checkpoints, component=cfg.model),
        pytest.raises(CheckpointError, match=r"(?i)another"),
    ):
        run_job(cfg, run.path, "toy")
    assert not run.record.exists()  # it is the other job's to write


def test_a_kill_before_the_last_evaluation_does_not_stop_the_run_from_ending(tmp_path: Path) -> None:
    cfg, run = toy_config(steps=8), RunDirectory(tmp_path / "run")
    whole = run_job(cfg, run.path, "toy")
    # As a kill between the last evaluation and the save of the last step leaves it.
    shutil.rmtree(run.checkpoints / "8")
    assert run_job(cfg, run.path, "toy").fingerprint == whole.fingerprint
    assert [m["step"] for m in run.read_metrics() if m["kind"] == "held_out"] == [0, 6, 8]


def test_a_directory_where_nothing_was_trained_takes_another_config(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="told to fail"):
        run_job(toy_config(steps=8, fails_at=1), tmp_path / "run", "toy")
    assert run_job(toy_config(steps=4), tmp_path / "run", "toy").trained > 0


def test_a_finished_run_that_is_run_again_says_the_same(tmp_path: Path) -> None:
    first = run_job(toy_config(steps=4), tmp_path / "run", "toy")
    again = run_job(toy_config(steps=4), tmp_path / "run", "toy")
    assert (again.fingerprint, again.trained, again.untrained) == (
        first.fingerprint,
        first.trained,
        first.untrained,
    )
