"""The launch command on text of one's own, as a user types it: all processes, all libraries."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.as_user import start, write_texts

_LAUNCH = Path(os.environ["RUNFILES_DIR"], "pippin_repo/packages/train/pippin/train/launch")
_SMALL = [
    *("--recipe", "afm_on_device_2024_tiny_core", "--steps", "12"),
    *("--set", "model.vocab_size=320", "--set", "input.tokenizer.vocab_size=320"),
    *("--set", "model.dim=16", "--set", "model.decoder.layer.feed_forward.hidden_dim=32"),
    *("--set", "input.batch_size=4", "--set", "checkpointer.every_steps=3", "--set", "log_every_steps=3"),
    *("--set", "input.heldout_every=3"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with text, good and bad."""
    folder = tmp_path_factory.mktemp("home")
    write_texts(folder)
    good = [json.dumps({"text": f"Record {i} tells of pippins, grown from seed. " * 20}) for i in range(12)]
    (folder / "records.jsonl").write_text(
        "\n".join([*good, '{"text": "cut off', '{"body": "elsewhere"}']) + "\n"
    )
    return folder


def launch(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return start(home, _LAUNCH, *_SMALL, "--data", "*.[tj]*", *arguments, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def whole(home: Path) -> str:
    """What an uninterrupted run prints."""
    return finish(launch(home, "--out", "whole"))


def test_a_run_prints_what_it_learned_and_where_things_are(home: Path, whole: str) -> None:
    for line in ("untrained model", "unigram baseline", "trained model", "fingerprint", "report"):
        assert line in whole
    assert (home / "whole" / "report.html").exists() and (home / "whole" / "tokenizer").is_dir()


def test_bad_input_is_named_with_file_and_line_and_counted(whole: str) -> None:
    assert re.search(r"records\.jsonl:13: .*json", whole, re.IGNORECASE)
    assert re.search(r"records\.jsonl:14: .*field", whole, re.IGNORECASE)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(home: Path, whole: str) -> None:
    killed = launch(home, "--out", "killed")
    assert killed.stdout is not None
    while not (home / "killed" / "checkpoints" / "6").exists():
        assert killed.poll() is None, killed.stdout.read()
    killed.kill()
    killed.communicate()
    printed = finish(launch(home, "--out", "killed"))
    assert re.search(r"from the checkpoint of step (6|9|12)", printed)
    assert re.findall(r"fingerprint +(\w+)", printed) == re.findall(r"fingerprint +(\w+)", whole)


def test_fatal_policy_stops_at_bad_input(home: Path) -> None:
    process = launch(home, "--out", "fatal", "--set", "input.bad_input=fatal")
    printed, _ = process.communicate()
    assert process.returncode == 2
    assert "records.jsonl" in printed and "Traceback" not in printed


def test_no_data_is_told_without_a_stack_trace(home: Path) -> None:
    process = launch(home, "--out", "none", "--data", "absent/*.txt")
    printed, _ = process.communicate()
    assert process.returncode == 2
    assert "absent/*.txt" in printed and "Traceback" not in printed


def test_a_stage_starts_from_what_the_run_before_it_learned(home: Path, whole: str) -> None:
    longer = ["--recipe", "afm_on_device_2024_tiny_context", "--set", "input.sequence_length=128"]
    printed = finish(launch(home, *longer, "--set", "init_from=whole", "--steps", "2", "--out", "longer"))
    before, after = (
        float(re.findall(r"step 0: .* perplexity ([\d.,]+)", p)[0].replace(",", "")) for p in (whole, printed)
    )
    assert after < before / 2
