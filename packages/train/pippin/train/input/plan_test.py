import threading
from pathlib import Path
from typing import Any

import pytest

from pippin.core.errors import DataError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.input.config import SentencePieceConfig, TextInputConfig
from pippin.train.input.plan import Plan
from pippin.train.input.testing import fill, input_config, write_rows


def _config(directory: Path, **fields: Any) -> TextInputConfig:
    write_rows(directory / "a.jsonl", [f"the row {letter} of a" for letter in "abcdefghij"])
    write_rows(directory / "b.jsonl", [f"another row {letter}" for letter in "abcdefghij"])
    return input_config(directory, {"a": "a.jsonl", "b": "b.jsonl"}, **fields)


def _stores(directory: Path, **fields: Any) -> list[Path]:
    plan = Plan(_config(directory, **fields), directory / "cache", None)
    return [store.directory for store in plan.stores()]


def test_each_side_of_each_task_has_a_store(tmp_path: Path) -> None:
    plan = Plan(_config(tmp_path), tmp_path / "cache", None)
    assert [(s.task.name, s.split.name) for s in plan.stores()] == [
        ("a", "train"),
        ("b", "train"),
        ("a", "heldout"),
        ("b", "heldout"),
    ]
    assert len({store.directory for store in plan.stores()}) == 4
    assert not any(store.complete() for store in plan.stores())
    fill(plan.stores()[0], plan.tokenizer_dir)
    assert [store.complete() for store in plan.stores()] == [True, False, False, False]


def test_what_the_rows_depend_on_changes_the_store_and_nothing_else_does(tmp_path: Path) -> None:
    stores = _stores(tmp_path)
    assert _stores(tmp_path, batch_size=8, seed=5, prefetch=1) == stores
    assert not {*_stores(tmp_path, sequence_length=8)} & {*stores}
    assert not {*_stores(tmp_path, heldout_every=7)} & {*stores}
    limited = _stores(tmp_path, heldout_rows=3)
    assert limited[:2] == stores[:2] and not {*limited[2:]} & {*stores}
    other = SentencePieceConfig(vocab_size=300)
    plan = Plan(_config(tmp_path).set(tokenizer=other), tmp_path / "cache", None)
    plan.train_tokenizer(threading.Event())
    assert not {store.directory for store in plan.stores()} & {*stores}


def test_a_tokenizer_is_trained_once_on_the_training_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(tmp_path).set(tokenizer=SentencePieceConfig(vocab_size=300))
    plan = Plan(cfg, tmp_path / "cache", None)
    assert not plan.has_tokenizer()
    read = threading.Event()
    plan.train_tokenizer(read)
    assert read.is_set() and plan.has_tokenizer()
    assert load_tokenizer(plan.tokenizer_dir).encode("the row")
    again = Plan(cfg.set(sequence_length=9, seed=1), tmp_path / "cache", None)
    assert again.has_tokenizer() and again.tokenizer_dir == plan.tokenizer_dir
    monkeypatch.setattr(SentencePieceConfig.implementation(), "train", None)
    again.train_tokenizer(threading.Event())
    larger = Plan(cfg.set(tokenizer=SentencePieceConfig(vocab_size=301)), tmp_path / "cache", None)
    assert not larger.has_tokenizer()


def test_each_task_gives_training_text_by_its_rate(tmp_path: Path) -> None:
    tasks = _config(tmp_path).mixture.tasks
    cfg = _config(tmp_path, heldout_every=1000).set(
        tokenizer=SentencePieceConfig(vocab_size=300, training_bytes=100),
        mixture=_config(tmp_path).mixture.set(tasks=(tasks[0].set(rate=3.0), tasks[1])),
    )
    texts = list(Plan(cfg, tmp_path / "cache", None)._training_texts(threading.Event()))
    of_a = [text for text in texts if text.startswith("the")]
    assert 75 <= sum(map(len, of_a)) < 75 + 15
    assert 25 <= sum(map(len, texts)) - sum(map(len, of_a)) < 25 + 15


def test_a_training_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n")
    cfg = input_config(tmp_path, {"a": "a.jsonl"}).set(tokenizer=SentencePieceConfig(vocab_size=300))
    plan = Plan(cfg, tmp_path / "cache", None)
    with pytest.raises(DataError, match="cannot train 300 pieces"):
        plan.train_tokenizer(threading.Event())
    assert not plan.has_tokenizer()
    assert [path.suffix for path in plan.tokenizer_dir.parent.iterdir()] == [".lock"]
