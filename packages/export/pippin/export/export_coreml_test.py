"""The command: from a model on disk to a package with all that goes with it, or to an error and nothing else."""

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pippin.core.adapter import LowRank, save_adapter
from pippin.core.bundle import save_bundle
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.export import coreml, verify
from pippin.export import lower_testing as t
from pippin.export.compress.recipes import DEFAULT_RECIPE, NO_RECIPE
from pippin.export.coreml_tools import ct
from pippin.export.export_coreml import Options, export_coreml
from pippin.export.output import Places, new_export, read_manifest
from pippin.export.tiny_models import CONFIGS, save_byte_level, save_tiny
from pippin.export.verification import PUBLISHED_UNITS, Comparison, read_adapter
from pippin.layers import configs as c
from pippin.layers.adapter import adapter_of, model_signature
from pippin.layers.model_files import open_model

_SIZES = ["--context", "64", "--prefill", "24"]
_PLAIN = [*_SIZES, "--recipe", NO_RECIPE]
_OPTIONS = Options(context_length=64, prefill_length=24, recipe=NO_RECIPE)


@pytest.fixture
def bundle(tmp_path):
    made = t.model(t.TINY)
    return save_bundle(tmp_path / "tiny", made.cfg, made.params)


def _hashes(package):
    files = sorted(path for path in package.rglob("*") if path.is_file())
    return {p.relative_to(package).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _perplexity(told):
    return re.search(r"perplexity of the float model +([\d.]+)", told)[1]


def test_the_command_writes_a_package_and_says_what_it_is(bundle, tmp_path, capsys):
    out = tmp_path / "out" / "small.mlpackage"
    assert coreml.main(["--model", str(bundle), "--out", str(out), *_PLAIN]) == 0
    told = capsys.readouterr()
    assert "q_proj" in told.out and "16.000" in told.out and str(out) in told.out
    assert "write prefill" in told.err
    exported = read_manifest(Places.of(out))
    assert (exported.target, exported.bits_per_weight) == ("coreml", 16.0)
    assert exported.model_signature == model_signature(open_model(bundle).params())
    assert [f.name for f in exported.functions] == ["prefill", "decode"]
    page = (tmp_path / "out" / "small" / "report.html").read_text()
    assert "<svg" in page and "http" not in page and "q_proj" in page
    # Apple's own library reads it, and finds what it looks for.
    opened = ct.models.MLModel(str(out), skip_model_load=True)
    assert opened.user_defined_metadata["contextLength"] == "64"
    assert opened.short_description.startswith("tiny: a causal language model of 0.1 million")
    function = opened.get_spec().description.functions[1]
    assert [i.name for i in function.input] == ["inputIds", "position", "causalMask"]
    assert all(i.shortDescription for i in (*function.input, *function.output, *function.state))


def test_prompts_that_are_read_in_one_part_of_most_of_the_context_are_verified(bundle, tmp_path, capsys):
    given = ["--model", str(bundle), "--out", str(tmp_path / "x.mlpackage"), *_PLAIN, "--prefill", "48"]
    assert coreml.main(given) == 0, capsys.readouterr().err
    assert re.search(r"greedy tokens that are equal +8 of 8", capsys.readouterr().out)


def test_a_recipe_compresses_and_leaves_the_bundle_that_the_package_is_of(bundle, tmp_path, capsys):
    out = tmp_path / "x.mlpackage"
    given = [
        "--model",
        str(bundle),
        "--out",
        str(out),
        *_SIZES,
        "--recipe",
        "int8",
        "--verify-steps",
        "4",
    ]
    assert coreml.main(given) == 0
    assert re.search(r"greedy tokens that are equal +4 of 4", capsys.readouterr().out)
    exported = read_manifest(Places.of(out))
    schemes = {w.name: (w.scheme, w.bits) for w in exported.weights}
    assert schemes["decoder.layers.1.attention.k_proj.weight"] == ("scaled", 8)
    assert exported.recipe == "int8" and exported.bits_per_weight < 9
    kept = tmp_path / "x" / "compressed"
    assert exported.model_signature == model_signature(open_model(kept).params())
    assert exported.source_signature == model_signature(open_model(bundle).params())
    # Either is the model that was exported, and no other is what it was compressed from.
    asked = ["--steps", "2", "--mode", "exact", "--perplexity", "64"]
    assert verify.main([str(out), "--model", str(bundle), *asked]) == 0
    from_floats = _perplexity(capsys.readouterr().out)
    assert verify.main([str(out), "--model", str(kept), "--float-model", str(bundle), *asked]) == 0
    assert _perplexity(capsys.readouterr().out) == from_floats
    assert verify.main([str(out), "--model", str(kept), *asked]) == 0
    told = capsys.readouterr().out
    assert "perplexity of the package's weights in JAX" in told and "float model" not in told
    made = t.model(t.TINY, seed=7)
    other = save_bundle(tmp_path / "other", made.cfg, made.params)
    assert verify.main([str(out), "--model", str(kept), "--float-model", str(other), *asked]) == 2
    assert f"compressed from the model with the signature {exported.source_signature[:12]}; {other} has" in (
        capsys.readouterr().err
    )
    # The bundle gives the same package.
    again = tmp_path / "y.mlpackage"
    assert coreml.main(["--model", str(kept), "--out", str(again), *_SIZES, "--verify-steps", "0"]) == 0
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    assert _hashes(out)[weights] == _hashes(again)[weights]
    assert coreml.main(["--model", str(kept), "--out", "z.mlpackage", "--recipe", "int8"]) == 2
    assert "compressed already, by int8" in capsys.readouterr().err


def test_without_a_recipe_floats_are_palettized(tmp_path, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "x.mlpackage"
    assert coreml.main(["--model", str(model), "--out", str(out), *_SIZES, "--perplexity-tokens", "64"]) == 0
    told = capsys.readouterr()
    assert "compress the weights by palettize_4bit" in told.err and "palettized 4" in told.out
    exported = read_manifest(Places.of(out))
    assert exported.recipe == DEFAULT_RECIPE and exported.bits_per_weight < 8
    assert {(w.scheme, w.bits) for w in exported.weights if "decoder" in w.name and "_proj" in w.name} == {
        ("palettized", 4)
    }
    assert exported.parity.perplexity_before != exported.parity.perplexity_after
    # What was compressed already stays as it is.
    again = ["--model", str(tmp_path / "x" / "compressed"), "--out", str(tmp_path / "y.mlpackage"), *_SIZES]
    assert coreml.main([*again, "--perplexity-tokens", "0", "--verify-steps", "0"]) == 0
    assert "keep the weights as they are" in capsys.readouterr().err
    assert list(read_manifest(Places.of(tmp_path / "y.mlpackage")).weights) == list(exported.weights)


def test_an_adapter_of_the_floats_is_not_for_what_they_are_compressed_to(tmp_path, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "x.mlpackage"
    adapter = _adapter(tmp_path / "a", model_signature(open_model(model).params()), scale=1e-3)
    given = ["--model", str(model), "--out", str(out), *_SIZES, "--adapter", str(adapter)]
    assert coreml.main(given) == 2
    told = capsys.readouterr().err
    assert "trained on the weights of model as they are" in told and "--recipe none" in told
    assert not out.exists() and not (tmp_path / "x").exists()
    assert coreml.main([*given, "--recipe", NO_RECIPE, "--perplexity-tokens", "0"]) == 0


@pytest.mark.parametrize(("error", "equal"), [(np.inf, 4), (0.01, 1)])
def test_a_package_that_is_not_its_model_is_not_left_behind(
    bundle, tmp_path, monkeypatch, capsys, error, equal
):
    found = Comparison("float16", PUBLISHED_UNITS, error, 10.0, equal, 4, "")
    monkeypatch.setattr("pippin.export.measure.compare", lambda *_, **__: found)
    out = tmp_path / "x.mlpackage"
    assert coreml.main(["--model", str(bundle), "--out", str(out), *_PLAIN]) == 2
    assert "does not compute what tiny does" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_what_appears_meanwhile_is_left_alone(bundle, tmp_path):
    out = tmp_path / "x.mlpackage"
    with pytest.raises(CheckpointError), new_export(out, ".mlpackage", 1) as places:
        places.package.mkdir()
        (out / "theirs").mkdir(parents=True)
    assert (out / "theirs").is_dir()


def test_the_same_model_gives_the_same_bytes(bundle, tmp_path):
    for name in ("a", "b"):
        program = (
            "from pippin.export import coreml; import sys; sys.exit(coreml.main(sys.argv[1:]))",
            *("--model", str(bundle), "--out", str(tmp_path / f"{name}.mlpackage"), *_PLAIN),
        )
        subprocess.run([sys.executable, "-c", *program], check=True, capture_output=True)
    first, second = (_hashes(tmp_path / f"{name}.mlpackage") for name in ("a", "b"))
    assert first == second and len(first) == 3


def test_what_a_mac_checks_lies_beside_the_package(bundle, tmp_path):
    out = tmp_path / "x.mlpackage"
    export_coreml(bundle, out, dataclasses.replace(_OPTIONS, verify_steps=4))
    listed = {file.path for file in read_manifest(Places.of(out)).files}
    assert {"x/golden.npz", "x/verify_on_mac.py"} <= listed
    with np.load(tmp_path / "x" / "golden.npz", allow_pickle=False) as golden:
        assert golden["functions"].tolist() == ["prefill"] * 2 + ["decode"] * 4


@pytest.mark.parametrize("name", ["swift", "compressed"])
def test_an_export_may_be_called_as_a_part_of_it(bundle, tmp_path, name):
    out = tmp_path / f"{name}.mlpackage"
    export_coreml(bundle, out, dataclasses.replace(_OPTIONS, recipe="int8"))
    exported = read_manifest(Places.of(out))
    assert {f"{name}/swift/Package.swift", f"{name}/compressed/manifest.textproto"} <= {
        file.path for file in exported.files
    }


def test_an_export_with_another_name_says_how_it_was_called(bundle, tmp_path):
    export_coreml(bundle, tmp_path / "x.mlpackage", _OPTIONS)
    (tmp_path / "x.mlpackage").rename(tmp_path / "y.mlpackage")
    (tmp_path / "x").rename(tmp_path / "y")
    with pytest.raises(CheckpointError, match="were written as x and x.mlpackage, by which"):
        read_manifest(Places.of(tmp_path / "y.mlpackage"))


def test_a_model_that_groups_do_not_fit_is_told_before_it_is_measured(tmp_path, capsys):
    cfg = override(CONFIGS["tied"], {"decoder.layer.attention.head_dim": 10})
    made = t.model(cfg)
    tokenizer = save_byte_level(tmp_path / "tokenizer")
    model = save_bundle(tmp_path / "model", made.cfg, made.params, tokenizer=tokenizer)
    assert coreml.main(["--model", str(model), "--out", str(tmp_path / "x.mlpackage"), *_SIZES]) == 2
    told = capsys.readouterr().err
    assert (
        "whose outputs (20) do not split into groups of 16. Take a recipe without groups, such as int8"
        in told
    )
    assert "calibrating" not in told


def test_damage_is_found(bundle, tmp_path):
    out = tmp_path / "x.mlpackage"
    export_coreml(bundle, out, _OPTIONS)
    weights = out / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamageError, match=r"weight\.bin: does not match"):
        read_manifest(Places.of(out))


def test_an_adapter_is_an_input_of_the_program(tmp_path):
    tuned_cfg = c.lora(rank=2, alpha=3.0)(t.TINY)
    tuned = t.model(tuned_cfg)
    tuned_bundle = save_bundle(tmp_path / "tuned", tuned.cfg, tuned.params)
    maps, base = adapter_of(open_model(tuned_bundle))
    adapter = save_adapter(tmp_path / "polite", maps, base)

    def without(params):
        if "base" in params:
            return params["base"]
        return {n: without(v) if isinstance(v, dict) else v for n, v in params.items()}

    bundle = save_bundle(tmp_path / "base", t.TINY, without(tuned.params))
    out = tmp_path / "out.mlpackage"
    # There is room for rank 4: the rest of it is zeros.
    export_coreml(bundle, out, dataclasses.replace(_OPTIONS, adapter_rank=4, adapters=(adapter,)))
    exported = read_manifest(Places.of(out))
    flat = read_adapter(tmp_path / "out" / "adapters" / "polite.bin", exported.adapter)
    assert flat.shape == (exported.adapter.length,) and exported.adapter.base_signature == base
    tokens = t.some_tokens(30)
    expected = t.reference(tuned.cfg, tuned.params, tokens)
    np.testing.assert_allclose(t.run(out, tokens, prompt=26, adapter=flat), expected, atol=1.2e-2)
    plain = t.reference(t.TINY, without(tuned.params), tokens)
    assert np.abs(plain - expected).max() > 0.1
    none = np.zeros_like(flat)
    np.testing.assert_allclose(t.run(out, tokens, prompt=26, adapter=none), plain, atol=1.2e-2)


def _adapter(folder, base, rank=2, path="decoder.layer.attention.q_proj", inputs=64, scale=1.0):
    down, up = np.ones((2, inputs, rank), np.float32) * scale, np.ones((2, rank, 64), np.float32)
    return save_adapter(folder, {path: LowRank(down, up)}, base)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ({"base": "f" * 64}, "was trained on the model with the signature ffffffffffff; this package holds"),
        ({"rank": 8}, "has rank 8; the package has room for 4. Export it with --adapter-rank 8"),
        ({"inputs": 32}, r"q_proj\.down is \[32, 2\]; the package has \[64, 4\] for it"),
        ({"path": "decoder.layer.attention.x_proj"}, "which the model does not have"),
        ({"scale": 1e6}, "beyond 65504"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left(bundle, tmp_path, what, expected):
    base = model_signature(open_model(bundle).params())
    adapter = _adapter(tmp_path / "a", **({"base": base} | what))
    options = dataclasses.replace(_OPTIONS, adapter_rank=4, adapters=(adapter,))
    with pytest.raises(CheckpointError, match=expected):
        export_coreml(bundle, tmp_path / "out" / "x.mlpackage", options)
    assert not list((tmp_path / "out").iterdir())


def test_room_for_adapters_is_as_large_as_the_largest(bundle, tmp_path):
    base = model_signature(open_model(bundle).params())
    adapters = [_adapter(tmp_path / f"rank_{rank}", base, rank) for rank in (2, 3)]
    given = [text for adapter in adapters for text in ("--adapter", str(adapter))]
    out = tmp_path / "x.mlpackage"
    assert coreml.main(["--model", str(bundle), "--out", str(out), *_PLAIN, *given]) == 0
    assert read_manifest(Places.of(out)).adapter.rank == 3


def test_mistakes_are_told_without_a_stack_trace(bundle, tmp_path, capsys):
    (tmp_path / "there.mlpackage").mkdir()
    for arguments, expected in (
        (["--model", str(tmp_path / "absent"), "--out", "x.mlpackage"], "neither a file, nor a directory"),
        (["--model", str(bundle), "--out", str(tmp_path / "x")], "does not end in .mlpackage"),
        (["--model", str(bundle), "--out", str(tmp_path / "there.mlpackage")], "is there already"),
        (["--model", str(bundle), "--out", "x.mlpackage", "--context", "100"], "multiple of 32"),
        (["--model", str(bundle), "--out", "x.mlpackage", "--recipe", "int9"], "there is no recipe 'int9'"),
        (["--model", str(bundle), "--out", "x.mlpackage", "--context", "32"], "Set prefill to 32"),
        (
            ["--model", str(bundle), "--out", f"{__file__}/x.mlpackage"],
            "export_coreml_test.py is no folder. Choose",
        ),
        (["--model", str(bundle), "--out", f"{'x' * 300}.mlpackage"], "Choose a place that exists"),
        (
            ["--model", str(bundle), "--out", "x.mlpackage", "--adapter", str(bundle)],
            "is a model, and no adapter",
        ),
        (
            ["--model", str(bundle), "--out", "x.mlpackage", "--context", "64", "--verify-steps", "33"],
            "there is room for 32 behind a prompt",
        ),
        (["--model", str(bundle), "--out", "x.mlpackage", "--verify-steps", "-1"], "both must be 0"),
        (
            ["--model", str(bundle), "--out", "x.mlpackage", "--adapter", "nosuch"],
            "nosuch: no such directory",
        ),
        (["--model", str(bundle), "--out", "x.mlpackage", "--adapter", __file__], "it is no directory"),
        (
            ["--model", str(bundle), "--out", "x.mlpackage"],
            "has no tokenizer, and the recipe palettize_4bit (the default)",
        ),
    ):
        assert coreml.main(arguments) == 2
        told = capsys.readouterr().err
        assert expected in told and "Traceback" not in told


def test_a_full_disk_leaves_nothing(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match="takes about 17 MB; the disk has 0 MB left. Make room"):
        export_coreml(bundle, tmp_path / "x.mlpackage", _OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


# Files of at most 100 kB: as a disk that fills up meanwhile.
_SMALL_FILES = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pippin.export import coreml, export_coreml
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(coreml.main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    made = t.model(override(t.TINY, {"vocab_size": 600}))
    bundle = save_bundle(tmp_path / "tiny", made.cfg, made.params)
    out = tmp_path / "x.mlpackage"
    command = [sys.executable, "-c", _SMALL_FILES, "--model", str(bundle), "--out", str(out), *_PLAIN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "was not saved" in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("pippin.export.package.load_program", CheckpointError),  # by which coremltools writes the weights
        ("pippin.export.measure.parity", RuntimeError),  # where JAX may run out of memory
    ],
)
def test_only_errors_of_writing_are_the_disks(bundle, tmp_path, monkeypatch, fails, told):
    def fail(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of something")

    monkeypatch.setattr(fails, fail)
    with pytest.raises(told, match="out of something") as error:
        export_coreml(bundle, tmp_path / "x.mlpackage", dataclasses.replace(_OPTIONS, verify_steps=2))
    assert ("Make room or mend the disk" in str(error.value)) == (told is CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_two_adapters_of_one_name_are_refused(bundle, tmp_path):
    base = model_signature(open_model(bundle).params())
    adapters = tuple(_adapter(tmp_path / folder / "polite", base) for folder in ("a", "b"))
    with pytest.raises(CheckpointError, match="two of the adapters are called polite"):
        export_coreml(bundle, tmp_path / "x.mlpackage", dataclasses.replace(_OPTIONS, adapters=adapters))


def test_a_model_that_was_trained_with_rounded_weights_is_exported_as_it_was_rounded(tmp_path, capsys):
    made = t.model(c.fake_quantized(bits=2, embedding_bits=4)(t.TINY))
    out = tmp_path / "x.mlpackage"
    model = save_bundle(tmp_path / "rounded", made.cfg, made.params)
    assert coreml.main(["--model", str(model), "--out", str(out), *_SIZES, "--verify-steps", "4"]) == 0
    assert {w.bits for w in read_manifest(Places.of(out)).weights} == {2, 4, 16}
    assert verify.main([str(out), "--model", str(model), "--steps", "4"]) == 0, capsys.readouterr().out
    again = ["--model", str(model), "--out", str(tmp_path / "y.mlpackage"), *_SIZES, "--recipe", "int8"]
    assert coreml.main(again) == 2
    assert "was trained with rounded weights. Export it without --recipe" in capsys.readouterr().err
