import os
import subprocess
import sys
from pathlib import Path

import pytest

from pippin.core.config import Config
from pippin.core.errors import ConfigError, DataError, PippinError
from pippin.train.input import preflight
from pippin.train.input.config import (
    FilesConfig,
    MixtureConfig,
    SentencePieceConfig,
    TaskConfig,
    TextInputConfig,
    TokenizerFilesConfig,
)
from pippin.train.input.testing import input_config, write_rows


def _files(source: Config) -> MixtureConfig:
    return MixtureConfig(tasks=(TaskConfig(name="a", source=source),))


def _config(directory: Path, **fields: object) -> TextInputConfig:
    write_rows(directory / "a.jsonl", ["abc"])
    return input_config(directory, {"a": "a.jsonl"}, **fields)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"mixture": _files(FilesConfig())},
            ConfigError,
            r"input.mixture.tasks.0.source.glob is not set, .*Give --data PATTERN, such as",
        ),
        (
            {"tokenizer": TokenizerFilesConfig()},
            ConfigError,
            r"input.tokenizer.directory is not set, .*Give --set input.tokenizer.directory=DIR",
        ),
        (
            {"mixture": MixtureConfig(tasks=(TaskConfig(),))},
            ConfigError,
            r"input.mixture.tasks.0.name is not set, .*Give --set input.mixture.tasks.0.name=VALUE",
        ),
        ({"mixture": _files(FilesConfig(glob="none/*.txt"))}, DataError, "'none/.*.txt' matches no file"),
        (
            {"tokenizer": TokenizerFilesConfig(directory="none")},
            DataError,
            "none holds no tokenizer: .*no such directory",
        ),
    ],
)
def test_a_config_that_cannot_start_is_refused_when_it_is_built(
    tmp_path: Path, fields: dict[str, Config], kind: type[PippinError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _config(tmp_path, **fields).build(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/cache cannot be written: .*set PIPPIN_CACHE_DIR"):
        _config(tmp_path).build(cache_dir=tmp_path / "file" / "cache")


def test_a_run_that_goes_on_needs_no_other_tokenizer(tmp_path: Path) -> None:
    cfg = _config(tmp_path, tokenizer=TokenizerFilesConfig(directory="moved away"))
    preflight.require_ready(cfg, tmp_path / "cache", tmp_path / "letters")


def test_a_class_of_the_script_that_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _config(tmp_path, tokenizer=SentencePieceConfig())
    monkeypatch.setattr(SentencePieceConfig, "__module__", "__main__")
    with pytest.raises(
        ConfigError,
        match="input.tokenizer is a SentencePieceConfig, declared in .*: the script that runs. .*--recipe-file",
    ):
        cfg.build(cache_dir=tmp_path / "cache")


def test_no_heavy_module_is_imported(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from pippin.core.errors import DataError\n"
        "from pippin.train.input.config import TextInputConfig, use_files\n"
        "cfg = use_files('none/*.txt')(TextInputConfig(batch_size=2, sequence_length=4))\n"
        "try:\n"
        "    cfg.build(cache_dir=pathlib.Path(sys.argv[1]))\n"
        "except DataError:\n"
        "    assert not {'jax', 'tensorflow', 'seqio', 'sentencepiece', 'pyarrow'} & set(sys.modules)\n"
        "else:\n"
        "    raise AssertionError('nothing was raised')"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
