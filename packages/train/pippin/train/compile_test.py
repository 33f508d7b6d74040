"""The command on real compilers: libtpu is an overlay of this test, and no TPU is needed."""

import re
from pathlib import Path

import pytest

from pippin.train.compile import main

_SMALL = [
    *("--recipe", "stdlib_tiny", "--set", "model.vocab_size=512", "--set", "model.dim=128"),
    *("--set", "model.decoder.num_layers=3", "--set", "input.sequence_length=128"),
]


def compiled(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main([*_SMALL, *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_step_is_compiled_for_each_target_and_tabled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    targets = {"tpu-v5e-4": 4, "tpu-v5p-8": 4, "tpu-7x-8": 8}
    code, text = compiled(capsys, *(a for t in targets for a in ("--target", t)), "--out", str(page))
    assert code == 0
    for target, devices in targets.items():
        assert re.search(rf"^{target} +{devices} +data {devices} +yes", text, re.MULTILINE)
    assert "SetPrecision: model.activation_dtype: float32 -> bfloat16" in text
    # Each device has all parameters, and so the gradients of all are summed over the data axis.
    sent = re.findall(r"all-reduce +over data +groups of [48] .* ([\d.]+) GB", text)
    assert len(sent) == 3 and all(float(s) > 0 for s in sent)
    assert page.read_text().count("data:image/png") == 3


def test_attention_takes_the_kernel_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("tpu-v5e-1", "tpu-v5e-4"):
        code, text = compiled(capsys, "--target", target, "--set", "input.sequence_length=128")
        assert code == 0 and "128 tokens, bfloat16: SplashKernel" in text
        code, text = compiled(capsys, "--target", target, "--set", "input.sequence_length=96")
        assert "96 tokens, bfloat16: BlockwiseKernel" in text
        assert "not SplashKernel: 96 tokens are no multiple of 128" in text


def test_a_step_over_a_split_state_gathers_it(capsys: pytest.CaptureFixture[str]) -> None:
    split = ["--set", "mesh_rules=()", "--set", "mesh.data=1", "--set", "mesh.fsdp=4"]
    code, text = compiled(capsys, *split, "--target", "tpu-v5e-4")
    assert code == 0
    assert re.search(r"^tpu-v5e-4 +4 +fsdp 4 +yes", text, re.MULTILINE)
    assert "over fsdp" in text and "over data" not in text


def test_of_several_slices_each_has_the_mesh_and_only_gradients_cross(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inside = ["--recipe", "llama2_7b", "--set", "model.vocab_size=512", "--set", "model.dim=128"]
    inside += ["--set", "model.decoder.num_layers=3", "--set", "input.sequence_length=128"]
    inside += ["--set", "input.batch_size=16"]
    assert main([*inside, "--target", "tpu-v5e-4x2"]) == 0
    text = capsys.readouterr().out
    assert "SetMesh: mesh.data: -1 -> 2" in text
    assert re.search(r"^tpu-v5e-4x2 +8 +data 2 x fsdp 4 +yes", text, re.MULTILINE)
    assert re.search(
        r"sent by each device: [\d.]+ GB inside a slice, in .* s; [\d.]+ GB between slices", text
    )
    lines = re.findall(
        r"^ +(\S+) +over (\S+) +groups of (\d+) .* sent by each device(.*)$", text, re.MULTILINE
    )
    crossing = {(kind, axes, size) for kind, axes, size, where in lines if where == ", between slices"}
    assert crossing == {("all-reduce", "data", "2")}
    # Parameters are gathered, and their gradients scattered, inside a slice.
    staying = {(kind, axes, size) for kind, axes, size, where in lines if not where}
    assert {axes for _, axes, _ in staying} == {"fsdp"} and ("all-gather", "fsdp", "4") in staying


def test_axes_that_may_cross_slices_make_up_the_slices(capsys: pytest.CaptureFixture[str]) -> None:
    over = ["--set", "mesh_rules=()", "--set", "mesh.data=1", "--target", "tpu-v5e-4x2"]
    code, text = compiled(capsys, *over, "--set", "mesh.fsdp=8")
    assert code == 0
    assert re.search(r"all-gather +over fsdp +groups of 2 .* between slices$", text, re.MULTILINE)
    code, text = compiled(capsys, *over, "--set", "mesh.tensor=8")
    assert code == 2
    assert "the devices are of 2 slices, and the axes that may cross slices" in text


def test_a_step_that_does_not_fit_is_said_with_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = compiled(capsys, "--set", "input.batch_size=65536", "--target", "tpu-v5e-1")
    assert code == 1
    assert re.search(r"^tpu-v5e-1 +1 +one device +NO +[\d.]+ of 16.0", text, re.MULTILINE)
    assert "A microbatch has 65536 rows a device: SetAccumulation" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tpu-v5e-1", "--out", "/proc/none/report.html"], "Check the path, the permissions"),
        (["--target", "tpu-v9-4"], "unknown target 'tpu-v9-4'"),
        (
            ["--target", "gpu-h100-8"],
            "is not installed. Use bazel run //packages/train:compile_gpu, or pip install 'pippin-train[cuda]'",
        ),
        (["--target", "cpu-2"], "cpu-2 is no accelerator"),
        (["--target", "tpu-v5e-48"], "tpu-v5e-48 is no TPU that there is"),
        (["--target", "tpu-v5e-512"], "or several slices of one, such as tpu-v5e-256x2"),
        (["--target", "gpu-h100-8x2"], "Write how many devices there are in all: gpu-h100-16"),
        (
            ["--target", "tpu-v5e-4", "--set", "input.batch_size=6"],
            "input.batch_size (6) must be a multiple of 4",
        ),
        (
            ["--target", "tpu-v5e-4", "--set", "mesh_rules=()", "--set", "mesh.tensor=3"],
            "does not fit 4 devices: its sizes multiply to 3",
        ),
    ],
)
def test_a_mistake_is_told_without_a_stack_trace(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = compiled(capsys, *arguments)
    assert code == 2
    assert message in text and "Traceback" not in text
