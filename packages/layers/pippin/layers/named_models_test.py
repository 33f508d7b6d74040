from pathlib import Path

import pytest

from pippin.core.errors import CheckpointError
from pippin.layers.named_models import MODELS, cached_path, find_model


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_a_name_is_found_in_the_cache(name: str, tmp_path: Path) -> None:
    command = f"bazel run //packages/layers:fetch -- {name}`, or `pippin-fetch {name}"
    with pytest.raises(CheckpointError, match=f"the model {name} is not on this machine.*{command}"):
        find_model(name, tmp_path)
    path = cached_path(name, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert find_model(name, tmp_path) == path


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path))
    name = next(iter(MODELS))
    assert cached_path(name).is_relative_to(tmp_path)


def test_anything_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="gpt-9 is neither a file, .*one of: smollm2-135m-instruct"):
        find_model("gpt-9")
