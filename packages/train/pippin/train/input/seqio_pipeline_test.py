"""The pipeline in this process. The import of seqio takes seconds, so nothing else here imports it."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pippin.core.errors import DataError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.input import store
from pippin.train.input.plan import Plan, PlannedStore
from pippin.train.input.rejects import Rejects
from pippin.train.input.store import StoreReader
from pippin.train.input.testing import input_config, reference_rows, write_letter_tokenizer, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow and its kin are full of deprecations


@pytest.fixture(scope="module")
def pipeline() -> ModuleType:
    return importlib.import_module("pippin.train.input.seqio_pipeline")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SHARD_TOKENS", 4 * 8)


def _plan(directory: Path, **fields: object) -> Plan:
    write_rows(directory / "rows.jsonl", ["abc", "de", "", "f" * 30, "g h", "ij", "\n"] * 4)
    (directory / "long.txt").write_text("".join(f"line {letter}\n" for letter in "abcdefghij" * 30))
    cfg = input_config(
        directory,
        {"rows": "rows.jsonl", "long": "long.txt"},
        **{"sequence_length": 8, "heldout_every": 5, **fields},
    )
    mixture = cfg.mixture.set(tasks=(cfg.mixture.tasks[0].set(rate=3.0), cfg.mixture.tasks[1]))
    return Plan(cfg.set(mixture=mixture), directory / "cache", None)


def _read(planned: PlannedStore) -> np.ndarray:
    def give_up() -> None:
        raise AssertionError("the store is not complete")

    reader = StoreReader(planned.directory, give_up)
    return np.stack([reader.row(i) for i in range(reader.completed().rows)])


def test_a_task_is_declared_in_the_registry(pipeline: ModuleType, tmp_path: Path) -> None:
    import seqio

    write_rows(tmp_path / "a.jsonl", ["abc", "", "de"])
    plan = Plan(input_config(tmp_path, {"a": "a.jsonl"}, heldout_every=1000), tmp_path / "cache", None)
    train, heldout = plan.stores()
    rejects = {("a", "train"): Rejects(), ("a", "heldout"): Rejects()}
    splits = [train.split, heldout.split]
    for _ in range(2):  # a second declaration takes the first one's place
        pipeline.register(plan.tasks, load_tokenizer(plan.tokenizer_dir), splits, rejects)
    task = seqio.get_mixture_or_task("pippin_a")
    assert set(task.splits) == {"train", "heldout"}
    (example,) = task.get_dataset(
        None, "train", shuffle=False, trim_output_features=False
    ).as_numpy_iterator()
    assert [ids.tolist() for ids in example["targets"]] == [[2, 3, 4], [5, 6]]
    assert [ids.dtype for ids in example["targets"]] == [np.int32, np.int32]
    assert example["starts"].tolist() == example["ends"].tolist() == [True, True]
    assert rejects["a", "train"].report.rejected == {"empty": 1}


def test_the_mixture_has_the_rates(pipeline: ModuleType, tmp_path: Path) -> None:
    import seqio

    plan = _plan(tmp_path)
    splits = [plan.stores()[0].split]
    pipeline.register(plan.tasks, load_tokenizer(plan.tokenizer_dir), splits, {})
    mixture = seqio.MixtureRegistry.get("pippin_mixture")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "pippin_rows": 3.0,
        "pippin_long": 1.0,
    }


def test_stores_hold_what_packing_without_seqio_gives(pipeline: ModuleType, tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    stores, begun = plan.stores(), []
    pipeline.pack(
        stores,
        load_tokenizer(plan.tokenizer_dir),
        fatal=False,
        begun=lambda: begun.append([planned.directory.joinpath("00000.npy").exists() for planned in stores]),
    )
    assert begun == [[True] * 4]
    assert len({planned.directory for planned in stores}) == 4
    for planned in stores:
        rejects = Rejects()
        expected = np.stack(list(reference_rows(planned, plan.tokenizer_dir, rejects)))
        np.testing.assert_array_equal(_read(planned), expected)
        index = StoreReader(planned.directory, lambda: None).completed()
        assert index.report == rejects.report
        listed = (planned.directory / "rejected.txt").read_text().splitlines()
        assert listed == rejects.report.examples


def test_held_out_rows_end_at_their_limit(pipeline: ModuleType, tmp_path: Path) -> None:
    plan = _plan(tmp_path, heldout_rows=2)
    stores = plan.stores()
    pipeline.pack(stores, load_tokenizer(plan.tokenizer_dir), fatal=False)
    assert [len(_read(planned)) for planned in stores if planned.split.heldout] == [2, 2]
    assert all(planned.complete() for planned in stores)


def test_a_reject_is_an_error_where_none_is_allowed(pipeline: ModuleType, tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: empty: 'text' is an empty text. Mend or remove it"):
        pipeline.pack(plan.stores(), load_tokenizer(plan.tokenizer_dir), fatal=True)
    assert not any(planned.complete() for planned in plan.stores()[:1])


def test_a_tokenizer_is_a_vocabulary(pipeline: ModuleType, tmp_path: Path) -> None:
    import tensorflow as tf

    tokenizer = load_tokenizer(write_letter_tokenizer(tmp_path / "letters"))
    vocabulary = pipeline.TokenizerVocabulary(tokenizer)
    assert list(vocabulary.encode("abc")) == [2, 3, 4]
    assert vocabulary.decode([2, 3, 4]) == "abc"
    assert vocabulary.encode_tf(tf.constant(["abc", "", "d"])).to_list() == [[2, 3, 4], [], [5]]
    assert vocabulary.decode_tf(tf.constant([2, 3, 4])).numpy() == b"abc"
    ids = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.vocab_size)
    assert ids == (0, 1, 1, tokenizer.vocab_size)
