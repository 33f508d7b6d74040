"""The command: from a model on disk to a program for Core AI with all that goes with it, or to an error and nothing else."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pippin.core.adapter import LowRank, save_adapter
from pippin.core.bundle import save_bundle
from pippin.core.errors import CheckpointError
from pippin.export import coreai, coreml
from pippin.export import lower_testing as t
from pippin.export.compress.recipes import NO_RECIPE
from pippin.export.coreai_emitter import Emitter
from pippin.export.coreai_runtime import CoreAIModel
from pippin.export.coreai_testing import run
from pippin.export.coreai_tools import AIModelAsset
from pippin.export.export_coreai import CoreAIOptions, export_coreai
from pippin.export.jax_reference import stored_reference
from pippin.export.output import Places, read_manifest
from pippin.export.tiny_models import VOCAB_SIZE, save_tiny
from pippin.export.verification import BOUND, read_adapter
from pippin.layers import configs as c
from pippin.layers.adapter import adapter_of, model_signature
from pippin.layers.model_files import open_model

# Keys, values and logits are float16 though it computes in float32; logits are about 5.
TOLERANCE = 1.2e-2

_SIZES = ["--context", "64", "--prefill", "24"]
_PLAIN = [*_SIZES, "--recipe", NO_RECIPE]
_QUICK = [*_PLAIN, "--precision", "float32"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    made = t.model(t.TINY)
    return save_bundle(tmp_path / "tiny", made.cfg, made.params)


def _command(model: Path, out: Path, *arguments: str) -> list[str]:
    return ["--model", str(model), "--out", str(out), *arguments]


def test_the_command_writes_a_program_with_all_that_goes_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # and back, when the command has gone where the user is
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    save_tiny(tmp_path / "tiny")
    given = ["--verify-steps", "12", "--perplexity-tokens", "64"]
    assert coreai.main(["--model", "tiny", "--out", "x.aimodel", *_QUICK, *given]) == 0
    told = capsys.readouterr().out
    assert re.search(r"greedy tokens that are equal +12 of 12", told) and "perplexity with" in told
    exported = read_manifest(Places.of(tmp_path / "x.aimodel"))
    assert (exported.target, exported.context_length, exported.prefill_length) == ("coreai", 64, 24)
    assert exported.parity.runtime == "coreai" and exported.parity.max_logit_error < TOLERANCE
    assert [f.name for f in exported.functions] == ["prefill", "decode"]
    assert exported.model_signature == model_signature(open_model(tmp_path / "tiny").params())
    assert not exported.source_signature
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "export_manifest.textproto",
        "report.html",
        "tokenizer",
    ]
    assert (tmp_path / "x" / "tokenizer" / "tokenizer.json").is_file()
    page = (tmp_path / "x" / "report.html").read_text()
    assert "For coreai: 16.000 bits a weight" in page and "q_proj" in page
    metadata = AIModelAsset.load(tmp_path / "x.aimodel").metadata
    assert metadata.model_description.startswith("tiny: a causal language model of 0.1 million")
    assert metadata.creator_defined_metadata["contextLength"] == "64"


def test_a_program_in_float16_is_held_against_its_model_too(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coreai.main(_command(bundle, tmp_path / "x.aimodel", *_PLAIN)) == 0
    assert re.search(r"by coreai, in float32 .*\n.*equal +8 of 8", capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "x", "x.aimodel"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "export_manifest.textproto",
        "report.html",
    ]


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_program_that_is_not_its_model_is_not_left_behind(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    number = Emitter.number
    monkeypatch.setattr(
        Emitter, "number", lambda self, value: number(self, -10 * value)
    )  # logits of attention
    given = _command(bundle, tmp_path / "x.aimodel", *_PLAIN, "--precision", precision)
    assert coreai.main(given) == 2
    assert re.search(
        r"does not compute what tiny does \(coreai.*\): the largest error of a logit is",
        capsys.readouterr().err,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_there_must_be_room_for_what_is_written_to_verify(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a program in float16 the same is written in float32 for a while."""
    weights = sum(2 * values.size for values in t.model(t.TINY).flat.values())
    free = (16 << 20) + int(1.5 * weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    options = CoreAIOptions(64, 24, recipe=NO_RECIPE, verify_steps=1)
    with pytest.raises(CheckpointError, match=r"the disk has .* left. Make room"):
        export_coreai(bundle, tmp_path / "x.aimodel", options)
    export_coreai(bundle, tmp_path / "x.aimodel", dataclasses.replace(options, precision="float32"))


def _base(params: Any) -> Any:
    """The parameters of a model without its LoRA layers."""
    if "base" in params:
        return params["base"]
    return {name: _base(value) if isinstance(value, dict) else value for name, value in params.items()}


def test_an_adapter_is_an_input_of_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = t.model(c.lora(rank=2, alpha=3.0)(t.TINY))
    tuned_bundle = save_bundle(tmp_path / "tuned", tuned.cfg, tuned.params)
    maps, signature = adapter_of(open_model(tuned_bundle))
    adapter = save_adapter(tmp_path / "polite", maps, signature)
    bundle = save_bundle(tmp_path / "base", t.TINY, _base(tuned.params))
    # There is room for rank 4: the rest of it is zeros.
    given = ["--adapter", str(adapter), "--adapter-rank", "4"]
    assert coreai.main(_command(bundle, tmp_path / "x.aimodel", *_QUICK, *given)) == 0
    assert "adapters of rank 4" in capsys.readouterr().out
    exported = read_manifest(Places.of(tmp_path / "x.aimodel"))
    assert exported.adapter.base_signature == signature and exported.adapter.rank == 4
    flat = read_adapter(tmp_path / "x" / "adapters" / "polite.bin", exported.adapter)
    tokens = t.some_tokens(30)
    expected = t.reference(tuned.cfg, tuned.params, tokens)
    plain = t.reference(t.TINY, _base(tuned.params), tokens)
    assert np.abs(plain - expected).max() > 0.1
    got, _ = run(tmp_path / "x.aimodel", tokens, prompt=26, adapter=flat)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    without, _ = run(tmp_path / "x.aimodel", tokens, prompt=26)
    np.testing.assert_allclose(without, plain, rtol=0, atol=TOLERANCE)
    zeros, _ = run(tmp_path / "x.aimodel", tokens, prompt=26, adapter=np.zeros_like(flat))
    np.testing.assert_array_equal(zeros, without)
    # A program that has no room computes the same as one without an adapter.
    export_coreai(
        bundle, tmp_path / "y.aimodel", CoreAIOptions(64, 24, recipe=NO_RECIPE, precision="float32")
    )
    bare, _ = run(tmp_path / "y.aimodel", tokens, prompt=26)
    np.testing.assert_allclose(bare, without, rtol=0, atol=TOLERANCE)
    with CoreAIModel(tmp_path / "y.aimodel") as program, pytest.raises(CheckpointError, match="takes 0"):
        program.use_adapter(flat)
    with CoreAIModel(tmp_path / "y.aimodel") as program:
        whole = program.extend([*tokens, *tokens, 1, 2, 3, 4])  # the caches are full
        assert whole.shape == (64, 96)
        with pytest.raises(CheckpointError, match="tokens 64 to 64 do not fit in caches of 64"):
            program.extend([5])
    # Core ML's package has the same input: a file of one is a file of the other.
    out = tmp_path / "z.mlpackage"
    assert coreml.main(_command(bundle, out, *_PLAIN, *given)) == 0
    assert (tmp_path / "z" / "adapters" / "polite.bin").read_bytes() == (
        tmp_path / "x" / "adapters" / "polite.bin"
    ).read_bytes()


def test_an_adapter_in_float16_is_added_too(tmp_path: Path) -> None:
    made = t.model(t.TINY)
    bundle = save_bundle(tmp_path / "tiny", made.cfg, made.params)
    signature = model_signature(open_model(bundle).params())
    rng = np.random.default_rng(0)
    pair = LowRank(
        *(0.2 * rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64, 3), (2, 3, 96)))
    )
    path = "decoder.layer.feed_forward.up_proj"
    adapter = save_adapter(tmp_path / "a", {path: pair}, signature)
    out = tmp_path / "x.aimodel"
    export_coreai(bundle, out, CoreAIOptions(64, 24, adapters=(adapter,), recipe=NO_RECIPE))
    layout = read_manifest(Places.of(out)).adapter
    assert layout.rank == 3  # the adapter's
    flat = read_adapter(tmp_path / "x" / "adapters" / "a.bin", layout)
    merged = dict(made.flat)
    for layer in range(2):
        name = f"decoder.layers.{layer}.feed_forward.up_proj.weight"
        merged[name] = merged[name] + pair.down[layer] @ pair.up[layer]
    tokens = t.some_tokens(28)
    expected = t.reference(made.flat_cfg, merged, tokens)
    assert np.abs(expected - t.reference(made.cfg, made.params, tokens)).max() > 0.1
    got, _ = run(out, tokens, prompt=26, adapter=flat)
    np.testing.assert_allclose(got, expected, rtol=0, atol=6e-2)


def test_a_recipe_compresses_and_both_of_apples_programs_compute_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two programs of the same compressed weights: one by Apple's kernels, one by an interpreter of the saved package."""
    model, out = save_tiny(tmp_path / "tiny"), tmp_path / "x.aimodel"
    given = ["--precision", "float32", "--perplexity-tokens", "0"]  # and no recipe: the default one
    assert coreai.main(_command(model, out, *_SIZES, *given)) == 0
    assert re.search(r"greedy tokens that are equal +8 of 8", capsys.readouterr().out)
    exported = read_manifest(Places.of(out))
    schemes = {w.name: (w.scheme, w.bits) for w in exported.weights}
    assert schemes["decoder.layers.1.attention.k_proj.weight"] == ("palettized", 4)
    assert schemes["embedding.weight"] == ("scaled", 8)
    assert exported.recipe == "palettize_4bit" and exported.bits_per_weight < 8
    assert exported.source_signature == model_signature(open_model(model).params())
    kept = tmp_path / "x" / "compressed"
    assert exported.model_signature == model_signature(open_model(kept).params())
    # The bundle gives a package for Core ML of the same weights.
    package = tmp_path / "y.mlpackage"
    assert (
        coreml.main(_command(kept, package, *_SIZES, "--perplexity-tokens", "0", "--verify-steps", "0")) == 0
    )
    other = read_manifest(Places.of(package))
    assert (other.model_signature, list(other.weights)) == (exported.model_signature, list(exported.weights))
    tokens = t.some_tokens(40, VOCAB_SIZE)
    apples, _ = run(out, tokens, prompt=30)
    ours = t.run(package, tokens, prompt=30)
    # This model's logits are about 10, and its attention is sharp.
    np.testing.assert_allclose(apples, ours, rtol=0, atol=BOUND)
    np.testing.assert_array_equal(apples.argmax(-1), ours.argmax(-1))
    jax = stored_reference(open_model(kept), len(tokens)).logits(tokens)
    np.testing.assert_allclose(apples, jax, rtol=0, atol=BOUND)


def test_mistakes_are_told_without_a_stack_trace(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.aimodel").mkdir()
    down, up = np.ones((2, 64, 2), np.float32), np.ones((2, 2, 64), np.float32)
    path = "decoder.layer.attention.q_proj"
    other = save_adapter(tmp_path / "other", {path: LowRank(down, up)}, "f" * 64)
    x = str(tmp_path / "x.aimodel")
    for arguments, problem in (
        (["--out", str(tmp_path / "there.aimodel")], "there.aimodel is there already. Remove it"),
        (["--out", "x.mlmodel"], "does not end in .aimodel"),
        (["--out", x, "--precision", "int3"], "there is no precision 'int3'. Choose one of float16, float32"),
        (["--out", x, "--context", "30"], "it must be a multiple of 32"),
        (["--out", x, "--verify-steps", "-1"], "both must be 0, for not at all, or more"),
        (["--out", x, "--adapter", str(tmp_path / "nosuch")], "nosuch: no such directory. Give one that"),
        (["--out", x, "--adapter", str(other)], "was trained on the model with the signature ffffffffffff"),
    ):
        assert coreai.main(["--model", str(bundle), *_QUICK, *arguments]) == 2
        told = capsys.readouterr().err
        assert problem in told and "Traceback" not in told
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.aimodel").exists()
