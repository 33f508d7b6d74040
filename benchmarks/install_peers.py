"""`bazel run //benchmarks:install_peers`: the servers that ours is measured beside, into the user's cache.

llama.cpp's server is compiled for this machine, which takes 7 minutes of a CPU's time or more and needs CMake and a C++
compiler. vLLM gets an environment of its own (2.5 GB). Both get the weights of the model in float32 (1.1 GB).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.serving.peers import COMMAND, LLAMA, MODEL, PeerError, Places, places
from pippin.core.errors import PippinError
from pippin.layers.named_models import find_model

_HERE = Path(__file__).parent
_VLLM_LOCK = _HERE.parent / "requirements_vllm.lock"
# Of the distribution that holds llama.cpp's sources, its server among them.
_LLAMA_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_LLAMA_SOURCES = "vendor/llama.cpp"
_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",  # all that this machine's processor can do
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # which would be downloaded
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="install_peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(_INSTALL)}; all of them where none is named")
    names = parser.parse_args(argv).names or list(_INSTALL)
    if unknown := [name for name in names if name not in _INSTALL]:
        parser.error(f"{unknown[0]} is none of {', '.join(_INSTALL)}")
    try:
        at = places()
        _install_weights(at)
        for name in names:
            _INSTALL[name](at)
            print(f"{name}: there", flush=True)
    except PippinError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _install_weights(at: Places) -> None:
    if at.gguf.is_file():
        return
    at.gguf.parent.mkdir(parents=True, exist_ok=True)
    script = str(_HERE / "serving" / "float32_weights.py")
    _run([os.environ["PIPPIN_PEERS_PYTHON"], "-I", script, str(find_model(MODEL)), str(at.gguf.parent)])


def _install_llama(at: Places) -> None:
    if at.llama_server.is_file():
        return
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise PeerError(f"there is no {tool} on this machine, which llama.cpp is built with. Install it.")
    at.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=at.folder) as scratch:
        folder = Path(scratch)
        sources = _fetch_sources(folder) / _LLAMA_SOURCES
        _run(["cmake", "-S", str(sources), "-B", str(folder / "build"), *_CMAKE])
        jobs = str(os.cpu_count() or 1)
        _run(["cmake", "--build", str(folder / "build"), "--target", "llama-server", "--parallel", jobs])
        at.llama_server.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "build" / "bin" / "llama-server", at.llama_server)


def _fetch_sources(folder: Path) -> Path:
    """The unpacked source distribution."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{LLAMA} --hash=sha256:{_LLAMA_SHA256}\n")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    # Its own build is never run: --no-build-isolation, and what says that it is missing, are not asked for.
    _run([*download, f"--dest={folder}", f"--requirement={pinned}"])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def _install_vllm(at: Places) -> None:
    if at.vllm_done.is_file():
        return
    # In its place, as what pip installs names the folder that it is in.
    environment = at.vllm_done.parent
    shutil.rmtree(environment, ignore_errors=True)
    _run([os.environ["PIPPIN_PEERS_PYTHON"], "-m", "venv", str(environment)])
    # --no-deps: the lock names all that is needed, and leaves out what cannot be imported beside the CPU build of torch.
    install = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--require-hashes"]
    _run([*install, f"--requirement={_VLLM_LOCK}"])
    at.vllm_done.touch()


_INSTALL: dict[str, Callable[[Places], None]] = {"llama": _install_llama, "vllm": _install_vllm}


def _run(command: Sequence[str]) -> None:
    """Runs a command, which says itself what is wrong."""
    print("$", " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, check=False).returncode:
        raise PeerError(f"{command[0]} failed; it says why above. Correct that, and run `{COMMAND}` again.")


if __name__ == "__main__":
    sys.exit(main())
