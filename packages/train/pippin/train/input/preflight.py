"""What a wrong config of input would only show after a while, found before anything is started."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pippin.core.config import REQUIRED, Config, field_hints
from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError, DataError
from pippin.train.input.config import FilesConfig, TextInputConfig, TokenizerFilesConfig
from pippin.train.input.packing_process import config_modules


def require_ready(cfg: TextInputConfig, cache_dir: Path, tokenizer_dir: Path | None) -> None:
    """Raises where an input could not start. It looks for files but reads no text, and imports neither JAX nor seqio.

    Args:
        cfg: the config of the input.
        cache_dir: where it keeps what it makes.
        tokenizer_dir: the tokenizer to use instead of the config's.

    Raises:
        ConfigError: a required field is not set, or a config's class cannot be imported by another process.
        DataError: a source has no files, the tokenizer is not where the config says, or the cache
            directory cannot be written.
    """
    for path, part in traverse(cfg):
        for name in field_hints(type(part)):
            if getattr(part, name) is REQUIRED:
                raise _unset(part, name, f"{path}.{name}" if path else name)
    config_modules(cfg)
    for task in cfg.mixture.tasks:
        task.source.build().files()
    if tokenizer_dir is None:
        cfg.tokenizer.build().directory()
    _require_writable(cache_dir)


def _unset(part: Config, name: str, path: str) -> ConfigError:
    if isinstance(part, FilesConfig) and name == "glob":
        needs, remedy = (
            "the files to train on",
            f"--data PATTERN, such as --data 'texts/**/*.txt', or --set input.{path}=PATTERN",
        )
    elif isinstance(part, TokenizerFilesConfig):
        needs, remedy = "the tokenizer's directory", f"--set input.{path}=DIR"
    else:
        needs, remedy = f"{type(part).__name__}.{name}", f"--set input.{path}=VALUE"
    return ConfigError(f"input.{path} is not set, and is required: it says {needs}. Give {remedy}.")


def _require_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as e:
        raise DataError(
            f"the cache directory {cache_dir} cannot be written: {e.strerror}. Tokenizers and packed text are kept "
            "in it. Make it writable, or set PIPPIN_CACHE_DIR to a directory that is."
        ) from None
