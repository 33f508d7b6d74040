import json
from pathlib import Path

import pytest

from pippin.core.errors import DataError
from pippin.train.input.order import Place
from pippin.train.input.plan import Plan, PlannedStore
from pippin.train.input.sample_state import decode_state, encode_state
from pippin.train.input.testing import input_config, write_rows

_PLACES = [Place(1, 2, 12), Place(0, 7, 7)]


def _stores(directory: Path, **fields: object) -> list[PlannedStore]:
    write_rows(directory / "a.jsonl", ["one", "two"])
    write_rows(directory / "b.jsonl", ["three"])
    cfg = input_config(directory, {"a": "a.jsonl", "b": "b.jsonl"}, **fields)
    return [store for store in Plan(cfg, directory / "cache", None).stores() if not store.split.heldout]


def test_places_come_back_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    stores = _stores(tmp_path)
    state = encode_state(stores, _PLACES, seed=3)
    assert decode_state(state, stores, seed=3) == _PLACES
    assert decode_state(state, stores[::-1], seed=3) == _PLACES[::-1]
    assert encode_state(stores[::-1], _PLACES[::-1], seed=3) == state


def test_another_seed_or_other_tasks_are_refused(tmp_path: Path) -> None:
    stores = _stores(tmp_path)
    state = encode_state(stores, _PLACES, seed=3)
    with pytest.raises(DataError, match="began with seed 3 of the input; now it is 4. Set it back"):
        decode_state(state, stores, seed=4)
    with pytest.raises(DataError, match=r"began with the tasks \['a', 'b'\]; now they are \['a'\]"):
        decode_state(state, stores[:1], seed=3)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    state = encode_state(_stores(tmp_path), _PLACES, seed=3)
    with pytest.raises(
        DataError, match="the sequence length of task 'a' has changed .* from 4 to 8.*Set it back"
    ):
        decode_state(state, _stores(tmp_path, sequence_length=8), seed=3)


def test_text_that_has_changed_is_refused(tmp_path: Path) -> None:
    state = encode_state(_stores(tmp_path), _PLACES, seed=3)
    stores = _stores(tmp_path)
    write_rows(tmp_path / "b.jsonl", ["four"])
    cfg = input_config(tmp_path, {"a": "a.jsonl", "b": "b.jsonl"})
    stores = [store for store in Plan(cfg, tmp_path / "cache", None).stores() if not store.split.heldout]
    with pytest.raises(
        DataError, match="the text of task 'b' has changed .*Put the files back as they were, or start"
    ):
        decode_state(state, stores, seed=3)


@pytest.mark.parametrize("state", [b"", b"[]", b'{"seed": 1}', b'{"seed": 1, "tasks": {"a": {}}}', b"\xff"])
def test_bytes_that_are_no_state_are_refused(tmp_path: Path, state: bytes) -> None:
    with pytest.raises(DataError, match=f"these {len(state)} bytes are no state of an input"):
        decode_state(state, _stores(tmp_path), seed=3)


def test_a_state_is_json(tmp_path: Path) -> None:
    value = json.loads(encode_state(_stores(tmp_path), _PLACES, seed=3))
    assert value["tasks"]["a"]["place"] == {"epoch": 1, "position": 2, "drawn": 12}
