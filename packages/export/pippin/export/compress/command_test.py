"""Tests of the command: what it writes and tells, and what it says of mistakes."""

import re

import numpy as np

from pippin.core import manifest
from pippin.core.bundle import load_bundle, save_bundle
from pippin.export.compress import command
from pippin.export.compress.testing import random_params, save_model, save_tokenizer, tiny_config

_SHORT = [
    "--set",
    "calibration.tokens=64",
    "--set",
    "evaluation.tokens=64",
    "--set",
    "calibration.sequence_length=32",
]
_SHORT += ["--set", "evaluation.sequence_length=32"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = command.main([*map(str, arguments), *_SHORT])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_model_is_compressed_and_read_again(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    out = tmp_path / "small"
    code, told, _ = run(capsys, "--model", model, "--recipe", "palettize_4bit", "--out", out)
    assert code == 0
    assert re.search(r"^layers +weights +bits/weight +MB +stored as \(matrices\)$", told, re.MULTILINE)
    assert re.search(r"^attention +6,144 +4\.500 +0\.00 +palette 4 \(8\)$", told, re.MULTILINE)
    assert re.search(r"^embedding +10,240 +8\.500 +0\.01 +scale 8 \(1\)$", told, re.MULTILINE)
    assert re.search(r"^all +28,832 +[\d.]+ +0\.02$", told, re.MULTILINE)
    assert re.search(r"^perplexity: 3\d\d\.\d+ before, 3\d\d\.\d+ after, of 64 tokens$", told, re.MULTILINE)
    assert told.endswith(f"{out}\n")
    bundle = load_bundle(out)
    assert bundle.quantization_recipe == "palettize_4bit"
    assert len(bundle.quantized) == 15
    assert bundle.tokenizer is not None
    assert bundle.provenance.source == str(model)
    module = bundle.component.build
    assert callable(module)
    assert run(capsys, "--model", out, "--recipe", "int8", "--out", tmp_path / "x")[2].startswith(
        f"error: {out} is compressed already, by palettize_4bit"
    )


def test_an_average_and_texts_of_one_s_own(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    (tmp_path / "text").write_text("the statement " * 99)
    text = ["--calibration", tmp_path / "text", "--evaluation", tmp_path / "text"]
    code, told, error = run(
        capsys,
        "--model",
        model,
        "--recipe",
        "mixed_3_7",
        "--bits-per-weight",
        4,
        "--out",
        tmp_path / "x",
        *text,
    )
    assert code == 0, error
    assert len(set(re.findall(r"palette \d", told))) > 1


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    model = save_model(tmp_path / "model", with_tokenizer=False)
    code, told, _ = run(capsys, "--model", model, "--recipe", "int8", "--out", tmp_path / "small")
    assert code == 0
    assert "perplexity: not measured" in told
    code, _, error = run(capsys, "--model", model, "--recipe", "palettize_4bit", "--out", tmp_path / "x")
    assert code == 2
    assert "has no tokenizer, and the recipe measures the model on text" in error


def test_the_recipes_are_listed(capsys):
    mixed = "choices=(2, 3, 4, 6, 8)), embedding Scale(bits=8)"
    assert run(capsys, "--list")[1].splitlines() == [
        "palettize_4bit  linear Palette(bits=4), embedding Scale(bits=8)",
        "palettize_2bit  linear Palette(bits=2), embedding Scale(bits=8)",
        f"mixed_3_7       linear MixedPalette(bits_per_weight=3.7, {mixed}",
        f"mixed_3_5       linear MixedPalette(bits_per_weight=3.5, {mixed}",
        "int8            linear Scale(bits=8), embedding Scale(bits=8)",
        "int4_block32    linear Scale(bits=4, block_size=32), embedding Scale(bits=8)",
        "float16         linear Float16(), embedding Float16()",
    ]


def test_mistakes_are_told_without_a_stack_trace_and_leave_nothing(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    for arguments, message in (
        (["--recipe", "int8", "--out", out], "--model is not given"),
        (["--model", model, "--recipe", "int9", "--out", out], "there is no recipe 'int9'"),
        (
            ["--model", model, "--recipe", "int8", "--out", tmp_path / "there"],
            "there is there already. Remove it",
        ),
        (
            ["--model", tmp_path / "absent", "--recipe", "int8", "--out", out],
            "neither a file, nor a directory",
        ),
        (
            ["--model", model, "--recipe", "int8", "--bits-per-weight", "3", "--out", out],
            "Use mixed_3_7 or mixed_3_5",
        ),
        (["--model", model, "--recipe", "int8", "--set", "linear.bits", "--out", out], "has no '='"),
        (
            ["--model", model, "--recipe", "int8", "--set", "linear.bit=8", "--out", out],
            "no field 'linear.bit'",
        ),
        (
            ["--model", model, "--recipe", "palettize_4bit", "--set", "linear.group_size=24", "--out", out],
            "do not split",
        ),
        (["--model", model, "--recipe", "mixed_3_7", "--bits-per-weight", "2", "--out", out], "allows"),
        (
            ["--model", model, "--recipe", "palettize_4bit", "--calibration", "absent", "--out", out],
            "cannot be read",
        ),
        (["--model", model, "--recipe", "int8", "--evaluation", "typo", "--out", out], "typo cannot be read"),
        (
            [
                "--model",
                model,
                "--recipe",
                "mixed_3_7",
                "--set",
                "linear.palette.group_size=24",
                "--out",
                out,
            ],
            "--set linear.palette.group_size=N",
        ),
    ):
        code, told, error = run(capsys, *arguments)
        assert code == 2, arguments
        assert error.splitlines()[-1].startswith("error: ")
        assert message in error, error
        assert "Traceback" not in error and "compressing" not in error
        assert not told
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model-tokenizer", "there"}


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    cfg = tiny_config()
    params = random_params(cfg)
    params["embedding"]["weight"][3, 4] = np.inf
    model = save_bundle(tmp_path / "model", cfg, params, tokenizer=save_tokenizer(tmp_path / "t"))
    code, _, error = run(capsys, "--model", model, "--recipe", "int8", "--out", tmp_path / "out")
    assert code == 2
    assert "embedding.weight holds NaN or infinity" in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    model = save_model(tmp_path / "model")

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_manifest", full)
    code, _, error = run(
        capsys, "--model", model, "--recipe", "int8", "--no-evaluation", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "was not saved: [Errno 28] No space left on device. Make room" in error
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model-tokenizer"}
