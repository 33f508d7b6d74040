"""Verifying saved programs for Core AI: Apple's runtime runs what lies on the disk."""

import re
from pathlib import Path

import numpy as np
import pytest

from pippin.core.adapter import LowRank, save_adapter
from pippin.core.bundle import save_bundle
from pippin.core.errors import ConfigError
from pippin.export import lower_testing as t
from pippin.export import verify
from pippin.export.compress.recipes import NO_RECIPE
from pippin.export.export_coreai import CoreAIOptions, export_coreai
from pippin.export.tiny_models import save_tiny
from pippin.export.verify_coreai import CoreAIPackage
from pippin.export.verify_package import Request, verify_package
from pippin.layers.adapter import model_signature
from pippin.layers.model_files import open_model


def exported(folder: Path, model: Path, precision: str, *adapters: Path) -> Path:
    options = CoreAIOptions(64, 24, recipe=NO_RECIPE, precision=precision, adapters=adapters)
    package = folder / f"{precision}.aimodel"
    export_coreai(model, package, options)
    return package


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = t.model(t.TINY)
    return save_bundle(tmp_path_factory.mktemp("model") / "tiny", made.cfg, made.params)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    rng = np.random.default_rng(0)
    pair = LowRank(*(0.2 * rng.standard_normal(s).astype(np.float32) for s in ((2, 64, 3), (2, 3, 96))))
    signature = model_signature(open_model(model).params())
    return save_adapter(model.with_name("polite"), {"decoder.layer.feed_forward.up_proj": pair}, signature)


@pytest.fixture(scope="module")
def package(model: Path, adapter: Path) -> Path:
    return exported(model.parent, model, "float32", adapter)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_program_is_its_model(
    package: Path, model: Path, with_adapter: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(package), "--model", str(model), "--steps", "8"]
    given += ["--adapter", str(package.with_suffix("") / "adapters" / "polite.bin")] if with_adapter else []
    assert verify.main(given) == 0
    told = capsys.readouterr().out
    assert re.search(r"float32: greedy tokens +8 of 8 +all +ok", told), told
    assert re.search(r"context 64, prefill 24, adapter [1-9]", told) and "all checks passed" in told


def test_perplexity_is_that_of_the_model(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    package = exported(tmp_path, model, "float32")
    report = verify_package(Request(package, str(model), steps=2, perplexity_tokens=100))
    assert report.passed, report.text
    change = re.search(r"perplexity of the package .*\(([-+].+)%\)", report.text)
    assert change is not None and abs(float(change[1])) < 1


def test_of_a_program_in_float16_as_much_is_run_as_takes_minutes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = exported(tmp_path, model, "float16")
    report = verify_package(Request(package, str(model), steps=4))
    assert report.passed and "float16: greedy tokens" in report.text and "slow here" not in report.text
    monkeypatch.setattr("pippin.export.coreai_parity._PRODUCTS", 0)  # as of a large model
    report = verify_package(Request(package, str(model), steps=4))
    assert report.passed and report.parity.decode_steps == 2
    assert "1 read, 2 decoded" in report.text
    with pytest.raises(ConfigError, match="takes hours here to measure perplexity"):
        verify_package(Request(package, str(model), steps=4, perplexity_tokens=8))


def test_another_adapter_is_another_model(
    package: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check fails where the program does not add what the model in JAX does."""
    monkeypatch.setattr(
        CoreAIPackage, "runner", lambda self, way, adapter=None: (self._model.reset(), self._model)[1]
    )
    path = package.with_suffix("") / "adapters" / "polite.bin"
    report = verify_package(Request(package, str(model), steps=2, adapter=path))
    assert "float32: largest error of a logit" in {check.name for check in report.checks if not check.passed}


def test_a_flipped_bit_is_refused_and_named(
    package: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = package / "main.mlirb"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    try:
        assert verify.main([str(package), "--model", str(model)]) == 1
    finally:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert "float32.aimodel/main.mlirb: does not match its SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--record"], ["--mode", "exact"]])
def test_what_is_for_core_ml_is_refused(
    package: Path, model: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(package), "--model", str(model), *asked]) == 2
    assert "is for Core AI, whose own runtime runs it as it is" in capsys.readouterr().err
