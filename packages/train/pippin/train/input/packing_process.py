"""The packing process as its parent sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pippin.core.component import to_text
from pippin.core.config import Config
from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError, DataError
from pippin.train.input.config import TextInputConfig

_ENVIRONMENT = {
    # The accelerator belongs to this process; seqio imports TensorFlow and JAX, which would take it.
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def config_modules(cfg: Config) -> dict[str, str]:
    """The modules that declare the configs of a tree, by name, each with its file.

    Raises:
        ConfigError: one is the script that runs, or was typed in: no other process can import it.
    """
    found = {}
    for path, part in traverse(cfg):
        name = type(part).__module__
        file = getattr(sys.modules.get(name), "__file__", None)
        if name == "__main__" or file is None:
            raise ConfigError(
                f"input{f'.{path}' if path else ''} is a {type(part).__name__}, declared in {file or name}: the script that runs. "
                "A process of its own packs the text, and has to import it. Move the class into a module, or into "
                "the file that --recipe-file names."
            )
        found[name] = os.path.abspath(file)
    return found


class PackingProcess:
    """A process that makes the tokenizer and the stores of a config, started now; see `worker`."""

    def __init__(self, cfg: TextInputConfig, cache_dir: Path, tokenizer_dir: Path | None):
        job = {
            "config": to_text(cfg),
            "modules": config_modules(cfg),
            "cache_dir": str(cache_dir),
            "tokenizer_dir": str(tokenizer_dir) if tokenizer_dir else None,
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pippin.train.input.worker"],
            stdin=subprocess.PIPE,  # kept open: the process dies when this one does
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,  # an interrupt at the terminal is for the parent to handle
        )
        self._ended = False
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def check(self) -> None:
        """Called while something is missing that the process should make.

        Raises:
            DataError: the process has ended without making it; with its reason.
        """
        status = self._process.poll()
        if status is None:
            return
        if status == 0 and not self._ended:
            self._ended = True  # it may have finished after the caller looked: look once more
            return
        assert self._process.stdout is not None
        for line in self._process.stdout.read().splitlines():
            raise DataError(json.loads(line)["error"])
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()[-15:]
        raise DataError(
            f"the process that packs the text ended with status {status}. Its last words:\n"
            + "\n".join(f"  {line}" for line in words or ["(none)"])
            + "\nRun the command again: what is packed stays packed. A status of -9 often means that memory ran out."
        )

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
