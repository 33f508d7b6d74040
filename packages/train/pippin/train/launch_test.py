import re
import subprocess
import sys
from pathlib import Path

import pytest

from pippin.core.component import from_text
from pippin.train import launch
from pippin.train.cluster.exit_codes import ERROR
from pippin.train.recipe import get

_HEAVY = ("jax", "tensorflow", "seqio", "numpy", "orbax", "matplotlib")


@pytest.mark.parametrize("arguments", [["--help"], ["--list"], ["--print-config"], ["--print-proto"]])
def test_questions_are_answered_without_heavy_imports(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from pippin.train import launch\n"
        "try:\n"
        "    code = launch.main(sys.argv[1:])\n"
        "except SystemExit as e:\n"
        "    code = e.code\n"
        f"loaded = [m for m in {_HEAVY} if m in sys.modules]\n"
        "sys.exit(f'imported {loaded}' if loaded else code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = launch.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_print_config_shows_what_was_set(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--print-config", "--steps", "7", "--set", "learner.learning_rate=0.5")
    assert code == 0
    assert "  steps: 7\n" in out and "    learning_rate: 0.5\n" in out


def test_print_proto_is_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--print-proto")
    assert from_text(out) == get("stdlib_tiny").make()


def test_a_component_is_swapped_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    swap = "model.decoder.layer.feed_forward=MoE"
    _, out, _ = run(
        capsys, "--print-config", "--set", swap, "--set", "model.decoder.layer.feed_forward.num_experts=4"
    )
    assert "feed_forward: pippin.layers.MoE" in out and "num_experts: 4" in out
    assert "hidden_dim: 512" in out  # kept from the feed-forward that was there


def test_data_replaces_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--print-config", "--data", "books/*.jsonl", "--text-field", "body")
    assert "glob: 'books/*.jsonl'" in out and "text_field: 'body'" in out and "Stdlib" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "stdlib_tny"], "did you mean 'stdlib_tiny'"),
        (["--set", "model.dimm=3"], "did you mean 'dim'"),
        (["--set", "steps"], "Write PATH=VALUE"),
        (["--text-field", "body"], "and there is none. Give --data GLOB"),
        (["--set", "model.decoder.layer.feed_forward=Mixtral"], "no component type 'Mixtral'"),
        (
            ["--set", "model.decoder.layer.feed_forward=RMSNorm"],
            "takes a component that provides 'feed_forward'",
        ),
        (["--steps", "0"], r"steps \(0\) must be at least 1"),
        (["--recipe-file", "absent.py"], "is no file"),
        (["--resume", "--out", "absent"], "holds no run"),
    ],
)
def test_mistakes_are_told_without_a_stack_trace(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == ERROR
    assert not out and err.startswith("error: ")
    assert re.search(message, err), err


def test_a_directory_of_another_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from pippin.train.run_directory import RunDirectory

    there = RunDirectory(tmp_path / "run")
    there.claim(get("stdlib_tiny").make())
    (there.checkpoints / "100").mkdir(parents=True)
    code, _, err = run(capsys, "--out", str(tmp_path / "run"), "--steps", "7")
    assert code == ERROR
    assert "steps: 420 -> 7" in err and "another --out" in err


def test_explain_says_which_rule_and_kernel_and_why_not_others(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--explain")
    assert code == 0
    assert "mesh rule: cpu-*" in out
    assert re.search(
        r"256 tokens, float32: BlockwiseKernel\n +not SplashKernel: it runs on TPUs, and this is a cpu", out
    )


def test_an_accelerator_without_a_rule_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from pippin.train.hardware.mesh_rules_config import MeshRuleConfig\n"
        "from pippin.train.recipe import get, recipe\n"
        "@recipe\n"
        "def for_tpus():\n"
        "    'For TPUs alone.'\n"
        "    return get('stdlib_tiny').make().set(mesh_rules=(MeshRuleConfig(accelerators='tpu-*'),))\n"
    )
    code, _, err = run(capsys, "--recipe-file", str(path), "--explain")
    assert code == 2
    assert "no mesh rule fits cpu-1. The rules are for tpu-*" in err
