"""The input over stores that are filled here, without seqio; see packing_process_test for the rest."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pippin.core.batch import Batch
from pippin.core.errors import ConfigError, DataError
from pippin.train.input import store, text_input
from pippin.train.input.config import BadInput, SentencePieceConfig, TextInputConfig
from pippin.train.input.plan import Plan
from pippin.train.input.testing import fill, input_config, write_rows
from pippin.train.input.text_input import TextInput


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four rows; a store that is not complete fails a test at once."""

    def refuse(*_: object) -> None:
        raise DataError("a process would be started")

    monkeypatch.setattr(store, "_SHARD_TOKENS", 16)
    monkeypatch.setattr(text_input, "PackingProcess", refuse)


Opener = Callable[..., TextInput]


@pytest.fixture
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Opener:
    """Makes inputs of one directory, on stores that are complete, and closes them."""

    def make(cfg: TextInputConfig, **settings: Any) -> TextInput:
        plan = Plan(cfg, tmp_path / "cache", settings.get("tokenizer_dir"))
        for planned in plan.stores():
            if not planned.complete():
                fill(planned, plan.tokenizer_dir)
        source = cfg.build(cache_dir=tmp_path / "cache", **settings)
        request.addfinalizer(source.close)
        return source

    return make


def _letters(directory: Path, **fields: Any) -> TextInputConfig:
    """Rows of one letter each, a to z, of which eight or nine are held out, and a task of upper case."""
    write_rows(directory / "letters.jsonl", [letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz"])
    write_rows(directory / "few.jsonl", [" a", " b", " c", " d", " e", " f"])
    return input_config(directory, {"letters": "letters.jsonl", "few": "few.jsonl"}, **fields)


def _equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])  # type: ignore[literal-required]


def test_batches_are_as_they_always_were(tmp_path: Path, opened: Opener) -> None:
    write_rows(tmp_path / "a.jsonl", ["abcdef", "x", "yz", "uvw", "kl", "mnopqr"])
    batch = next(opened(input_config(tmp_path, {"a": "a.jsonl"})))
    # "x" and "kl" are held out. Nothing fits beside what is left of "abcdef"; 1 is the end, and pads.
    assert batch["tokens"].tolist() == [[5, 6, 7, 1], [0, 14, 15, 16]]
    assert batch["targets"].tolist() == [[6, 7, 1, 1], [14, 15, 16, 17]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("taken", [0, 1, 3, 9, 20])
def test_a_restored_input_gives_the_same_batches(tmp_path: Path, opened: Opener, taken: int) -> None:
    cfg = _letters(tmp_path, batch_size=3)
    uninterrupted = opened(cfg)
    for _ in range(taken):
        next(uninterrupted)
    state = uninterrupted.state()
    restored = opened(cfg)
    next(restored)
    restored.restore(state)
    assert restored.state() == state
    for _ in range(15):  # over the ends of epochs of both tasks
        _equal(next(restored), next(uninterrupted))
        assert restored.state() == uninterrupted.state()


def test_the_state_is_of_what_was_taken_not_of_what_is_ready(tmp_path: Path, opened: Opener) -> None:
    source = opened(_letters(tmp_path, batch_size=2, prefetch=5))
    states = [json.loads(source.state())]
    for _ in range(3):
        next(source)
        states.append(json.loads(source.state()))
    drawn = [sum(task["place"]["drawn"] for task in state["tasks"].values()) for state in states]
    assert drawn == [0, 2, 4, 6]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one(tmp_path: Path, opened: Opener, count: int) -> None:
    cfg = _letters(tmp_path, batch_size=4)
    alone = opened(cfg)
    together = [opened(cfg, process_index=i, process_count=count) for i in range(count)]
    for _ in range(12):
        whole, shares = next(alone), [next(source) for source in together]
        assert shares[0]["tokens"].shape == (4 // count, 4)
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([s[name] for s in shares]))  # type: ignore[literal-required]
        assert len({source.state() for source in [alone, *together]}) == 1
    more = opened(cfg)
    more.restore(together[1].state())  # another number of processes goes on with the same sample
    _equal(next(more), next(alone))


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"batch_size \(3\) must be a multiple of the number of processes \(2\)"
    ):
        _letters(tmp_path, batch_size=3).build(process_count=2, cache_dir=tmp_path / "cache")


def test_held_out_rows_come_once_and_the_same_each_time(tmp_path: Path, opened: Opener) -> None:
    source = opened(_letters(tmp_path, batch_size=4))
    batches = list(source.eval_batches())
    assert all(batch["tokens"].shape == (4, 4) for batch in batches)
    for a, b in zip(batches, source.eval_batches(), strict=True):
        _equal(a, b)
    train = [next(source) for _ in range(20)]
    targets = [
        set(np.concatenate([b["targets"][b["loss_weights"] > 0] for b in side])) for side in (batches, train)
    ]
    letters = set(range(2, 28))
    assert (targets[0] & letters) | (targets[1] & letters) == letters
    by_task = [
        sum(int(b["loss_weights"].sum()) for b in source.eval_batches(task)) for task in source.task_names
    ]
    assert sum(by_task) == sum(int(b["loss_weights"].sum()) for b in batches)


def test_processes_share_held_out_rows_with_padding_at_the_end(tmp_path: Path, opened: Opener) -> None:
    cfg = _letters(tmp_path, batch_size=4)
    alone = list(opened(cfg).eval_batches("letters", batch_size=6))
    shares = [
        list(opened(cfg, process_index=i, process_count=2).eval_batches("letters", batch_size=6))
        for i in range(2)
    ]
    for whole, a, b in zip(alone, *shares, strict=True):
        np.testing.assert_array_equal(whole["tokens"], np.concatenate([a["tokens"], b["tokens"]]))
    assert alone[-1]["loss_weights"].sum(axis=1)[-1] == 0


def test_a_limit_of_held_out_rows_is_kept(tmp_path: Path, opened: Opener) -> None:
    source = opened(_letters(tmp_path, batch_size=1, heldout_rows=2))
    assert len(list(source.eval_batches("letters"))) == 2


def test_text_without_a_held_out_part_trains_but_does_not_evaluate(tmp_path: Path, opened: Opener) -> None:
    write_rows(tmp_path / "a.jsonl", ["abc"])
    source = opened(input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000))
    next(source)
    with pytest.raises(
        DataError, match=r"the mixture has no held-out text .*or lower heldout_every \(1000\)"
    ):
        next(source.eval_batches())
    with pytest.raises(DataError, match=r"task 'b' has no held-out text \(tasks: a\)"):
        next(source.eval_batches("b"))


def test_text_that_is_all_rejected_is_an_error(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "a.jsonl").write_text("{\n")
    source = opened(input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000))
    with pytest.raises(
        DataError, match=r"(?s)task 'a' has no text to train on: .*1 broken JSON\n.*a.jsonl:1: broken"
    ):
        next(source)


def test_tokens_are_counted(tmp_path: Path, opened: Opener) -> None:
    write_rows(tmp_path / "a.jsonl", ["abca", "b"])
    counts = opened(input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000)).token_counts(40)
    assert {i: int(n) for i, n in enumerate(counts) if n} == {1: 2, 2: 2, 3: 2, 4: 1}


def test_the_summary_says_what_was_read_and_what_was_not(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{\n{"body": "x"}\n{"text": "de"}\n')
    source = opened(input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000))
    next(source)
    train, heldout = source.summary()
    assert (train.task, train.split, train.complete, train.rows, train.tokens) == ("a", "train", True, 2, 7)
    assert train.report.rejected == {"broken JSON": 1, "missing field": 1}
    assert train.text().startswith(
        "a/train: 7 tokens in 2 rows, 12.5% padding; 2 documents, 0.0 MB; rejected: 1 broken"
    )
    assert heldout.rows == 0


def test_the_summary_names_few_rejects_and_where_the_rest_are(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' + "{\n" * 9)
    source = opened(input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000))
    next(source)
    train = source.summary()[0]
    assert len(train.text().splitlines()) == 5
    assert train.text().endswith(f"  and 6 more; all are named in {train.rejected_file}")


def test_rejects_of_an_earlier_run_are_an_error_where_none_is_allowed(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{\n')
    cfg = input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000)
    next(opened(cfg))
    source = opened(cfg.set(bad_input=BadInput.FATAL))
    with pytest.raises(
        DataError, match=r"(?s)task 'a' has input that cannot be used: .*a.jsonl:2: broken JSON"
    ):
        next(source)


def test_data_that_changed_since_is_refused(tmp_path: Path, opened: Opener) -> None:
    cfg = _letters(tmp_path)
    source = opened(cfg)
    next(source)
    state = source.state()
    path = write_rows(tmp_path / "few.jsonl", ["changed"])
    os.utime(path, (0, 0))
    with pytest.raises(DataError, match="the text of task 'few' has changed since the run began"):
        opened(cfg).restore(state)


def test_a_run_keeps_its_tokenizer(tmp_path: Path, opened: Opener) -> None:
    write_rows(tmp_path / "a.jsonl", ["abc", "de"])
    own = input_config(tmp_path, {"a": "a.jsonl"})
    elsewhere = own.set(tokenizer=TextInputConfig().tokenizer)  # would be trained
    source = opened(elsewhere, tokenizer_dir=tmp_path / "letters")
    assert source.tokenizer_dir == tmp_path / "letters"
    assert source.tokenizer.encode("abc") == [2, 3, 4]
    _equal(next(source), next(opened(own)))


def test_an_error_of_preparation_reaches_whoever_asks(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["abc"])
    cfg = input_config(tmp_path, {"a": "a.jsonl"}, tokenizer=SentencePieceConfig())
    with closing(cfg.build(cache_dir=tmp_path / "cache")) as source:
        for ask in (
            lambda: next(source),
            source.state,
            lambda: source.tokenizer_dir,
            lambda: next(source.eval_batches()),
            source.summary,
            lambda: source.restore(b""),
        ):
            with pytest.raises(DataError, match="a process would be started"):
                ask()


def test_two_tasks_may_have_the_same_text(tmp_path: Path, opened: Opener) -> None:
    write_rows(tmp_path / "a.jsonl", ["abc", "de", "fgh"])
    source = opened(input_config(tmp_path, {"a": "*.jsonl", "b": "*.jsonl"}))
    for _ in range(10):
        next(source)
    assert len(source.summary()) == 4
