"""The servers that ours is measured beside: where they lie, and what brings them. No JAX."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pippin.core.cache_dir import default_cache_dir
from pippin.core.errors import PippinError

MODEL = "smollm2-135m-instruct"
COMMAND = "bazel run //benchmarks:install_peers"

# What `install_peers` installs; it keeps each version in a folder of its own.
LLAMA = "llama-cpp-python==0.3.36"
_VLLM_VERSION = "0.32.0"


class PeerError(PippinError):
    """A peer cannot be had."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the peers lie."""

    folder: Path

    @property
    def llama_server(self) -> Path:
        """The program."""
        return self.folder / LLAMA.replace("==", "-") / "llama-server"

    @property
    def vllm_python(self) -> Path:
        """The interpreter that imports it."""
        return self.folder / f"vllm-{_VLLM_VERSION}" / "bin" / "python"

    @property
    def vllm_done(self) -> Path:
        """The file that says that its environment is whole."""
        return self.vllm_python.parents[1] / "installed"

    @property
    def gguf(self) -> Path:
        """The model in float32, for llama.cpp."""
        return self.folder / "float32" / MODEL / "model-f32.gguf"

    @property
    def hugging_face(self) -> Path:
        """The model in float32, for vLLM."""
        return self.gguf.parent / "hf"


def places() -> Places:
    """Where the peers lie on this machine, if they do."""
    return Places(default_cache_dir() / "peers")


def missing(name: str, at: Places) -> str | None:
    """What to do to have a peer; None where it is there."""
    needed = {"llama": [at.llama_server, at.gguf], "vllm": [at.vllm_done, at.gguf]}
    if name == "hf":
        return None if "PIPPIN_PEERS_PYTHON" in os.environ else "run by Bazel, which has its environment"
    absent = [path for path in needed[name] if not path.exists()]
    return f"{absent[0]} is not there: run `{COMMAND} -- {name}`" if absent else None
