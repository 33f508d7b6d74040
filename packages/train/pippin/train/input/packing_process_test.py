"""The input with its process, from text to batches, and what happens when either dies."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pippin.core.component import to_text
from pippin.core.config import Config
from pippin.core.errors import DataError
from pippin.train.input import text_input
from pippin.train.input.config import (
    BadInput,
    MixtureConfig,
    SentencePieceConfig,
    TaskConfig,
    TextInputConfig,
)
from pippin.train.input.packing_process import PackingProcess
from pippin.train.input.testing import input_config, write_rows

_NEXT_AFTER = """
import hashlib, pathlib, sys
import pippin.train.input.config
from pippin.core.component import from_text
config, cache, state = map(pathlib.Path, sys.argv[1:])
source = from_text(config.read_text()).build(cache_dir=cache)
source.restore(state.read_bytes())
batch = next(source)
print(hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
assert not {"jax", "tensorflow", "seqio"} & set(sys.modules)
source.close()
"""

_PARENT = """
import pathlib, sys, time
import pippin.train.input.config
from pippin.core.component import from_text
source = from_text(pathlib.Path(sys.argv[1]).read_text()).build(cache_dir=pathlib.Path(sys.argv[2]))
while source._packing is None:
    time.sleep(0.01)
print(source._packing.pid, flush=True)
next(source)
time.sleep(60)
"""

_RECIPE_FILE = """
from pippin.train.input.config import FilesConfig
from pippin.train.input.sources import FilesSource

class MineConfig(FilesConfig, implementation="my_recipes:Mine", provides="text_source"):
    pass

class Mine(FilesSource):
    Config = MineConfig
"""

_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _words(directory: Path, **fields: object) -> TextInputConfig:
    texts = [
        f"the {word} of {i} words\n    is here again, " * 9 for i in range(40) for word in ("first", "last")
    ]
    write_rows(directory / "words.jsonl", texts)
    cfg = input_config(directory, {"words": "words.jsonl"}, sequence_length=32, **fields)
    return cfg.set(tokenizer=SentencePieceConfig(vocab_size=400))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _require_death(pid: int) -> None:
    deadline = time.monotonic() + 30
    while _lives(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def test_text_becomes_batches_and_the_next_start_needs_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _words(tmp_path)
    with closing(cfg.build(cache_dir=tmp_path / "cache")) as source:
        batches = [next(source) for _ in range(120)]  # more than an epoch
        source.restore(source.state())
        heldout = list(source.eval_batches())
        assert source.tokenizer.vocab_size <= 400
        text = source.tokenizer.decode(batches[0]["tokens"][0].tolist())
        assert "words\n    is here again" in text
        assert [part.complete for part in source.summary()] == [True, True]
        assert source.summary()[0].rows < 240

    def refuse(*_: object) -> None:
        raise AssertionError("a process would be started")

    monkeypatch.setattr(text_input, "PackingProcess", refuse)
    with closing(cfg.build(cache_dir=tmp_path / "cache")) as again:
        for batch in batches[:60]:
            np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])
        (tmp_path / "state").write_bytes(again.state())
        following = next(again)
        for a, b in zip(again.eval_batches(), heldout, strict=True):
            np.testing.assert_array_equal(a["targets"], b["targets"])
    _require_equal_in_a_new_process(tmp_path, cfg, following)


def _require_equal_in_a_new_process(directory: Path, cfg: TextInputConfig, batch: object) -> None:
    import hashlib

    (directory / "config").write_text(to_text(cfg))
    arguments = [str(directory / name) for name in ("config", "cache", "state")]
    printed = subprocess.run(
        [sys.executable, "-c", _NEXT_AFTER, *arguments],
        env=_ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    )
    content = b"".join(value.tobytes() for _, value in sorted(batch.items()))  # type: ignore[attr-defined]
    assert printed.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_two_runs_at_once_share_the_work(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["abc", "de", "fgh"] * 20)
    cfg = input_config(tmp_path, {"a": "a.jsonl"})
    with (
        closing(cfg.build(cache_dir=tmp_path / "cache", process_count=2)) as first,
        closing(cfg.build(cache_dir=tmp_path / "cache", process_count=2, process_index=1)) as second,
    ):
        for _ in range(40):
            assert next(first)["tokens"].shape == next(second)["tokens"].shape == (1, 4)
        assert first.state() == second.state()


def test_a_process_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    with closing(_words(tmp_path).build(cache_dir=tmp_path / "cache")) as source:
        while source._packing is None:
            time.sleep(0.01)
        os.kill(source._packing.pid, signal.SIGKILL)
        with pytest.raises(
            DataError, match=r"(?s)packs the text ended with status -9.*Run the command again"
        ):
            next(source)
        with pytest.raises(DataError, match="ended with status -9"):
            source.state()


class BrokenConfig(Config, implementation=f"{__name__}:Broken", provides="text_source"):
    """A source with a fault of its own."""


class Broken:
    Config = BrokenConfig

    def __init__(self, cfg: BrokenConfig):
        raise RuntimeError("the author of this class erred")


def test_the_last_words_of_the_process_are_told(tmp_path: Path) -> None:
    cfg = _words(tmp_path)
    cfg = cfg.set(mixture=MixtureConfig(tasks=(TaskConfig(name="a", source=BrokenConfig()),)))
    words = r"(?s)ended with status 1. Its last words:.*RuntimeError: the author of this class erred"
    with (
        closing(PackingProcess(cfg, tmp_path / "cache", None)) as process,
        pytest.raises(DataError, match=words),
    ):
        while True:
            process.check()
            time.sleep(0.02)


def test_a_source_declared_in_a_file_of_recipes_is_found(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["abc", "de", "fgh"] * 5)
    (tmp_path / "my_recipes.py").write_text(_RECIPE_FILE)
    sys.modules["my_recipes"] = recipes = _load("my_recipes", tmp_path / "my_recipes.py")
    try:
        task = TaskConfig(name="a", source=recipes.MineConfig(glob=str(tmp_path / "a.jsonl")))
        cfg = input_config(tmp_path, {"a": "a.jsonl"}).set(mixture=MixtureConfig(tasks=(task,)))
        with closing(cfg.build(cache_dir=tmp_path / "cache")) as source:
            assert next(source)["tokens"].shape == (2, 4)
            assert source.summary()[0].task == "a"
    finally:
        del sys.modules["my_recipes"]


def _load(name: str, path: Path) -> Any:
    """Loads a file as `pippin.train.recipe.load_file` does: `import` does not find it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_input_that_must_not_be_lost_is_an_error(tmp_path: Path) -> None:
    cfg = _words(tmp_path, bad_input=BadInput.FATAL)
    with open(tmp_path / "words.jsonl", "a") as f:
        f.write("{\n" * 5)
    with (
        closing(cfg.build(cache_dir=tmp_path / "cache")) as source,
        pytest.raises(DataError, match=r"^[^\n]*words.jsonl:8\d: broken JSON: [^\n]*bad_input=skip[^\n]*$"),
    ):
        next(source)


def test_the_process_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(to_text(_words(tmp_path)))
    arguments = [str(tmp_path / "config"), str(tmp_path / "cache")]
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, *arguments], env=_ENVIRONMENT, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _lives(pid)
        parent.kill()
    _require_death(pid)


def test_closing_ends_the_process(tmp_path: Path) -> None:
    source = _words(tmp_path).build(cache_dir=tmp_path / "cache")
    while source._packing is None:
        time.sleep(0.01)
    pid = source._packing.pid
    source.close()
    _require_death(pid)
