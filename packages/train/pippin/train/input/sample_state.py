"""The state of an input as bytes: where each task is, and what its rows depend on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from pippin.core.errors import DataError
from pippin.train.input.order import Place
from pippin.train.input.plan import PlannedStore

_REMEDY = {
    "text": "Put the files back as they were",
    "tokenizer": "Use the tokenizer that the run began with, which its directory keeps",
}


def encode_state(stores: Sequence[PlannedStore], places: Sequence[Place], seed: int) -> bytes:
    """JSON, equal for equal states."""
    tasks = {
        store.task.name: {"place": dataclasses.asdict(place), "depends_on": store.depends_on}
        for store, place in zip(stores, places, strict=True)
    }
    return json.dumps({"seed": seed, "tasks": tasks}, sort_keys=True).encode()


def decode_state(state: bytes, stores: Sequence[PlannedStore], seed: int) -> list[Place]:
    """The place of each task, in the order of `stores`.

    Raises:
        DataError: the bytes are no state, or one of other text or settings, which are named.
    """
    try:
        value = json.loads(state)
        tasks = {
            name: (Place(**task["place"]), dict(task["depends_on"])) for name, task in value["tasks"].items()
        }
        old_seed = value["seed"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f"these {len(state)} bytes are no state of an input: {e!r}. Use an older checkpoint."
        ) from e
    if old_seed != seed:
        raise DataError(f"the run began with seed {old_seed} of the input; now it is {seed}. Set it back.")
    names = [store.task.name for store in stores]
    if set(tasks) != set(names):
        raise DataError(
            f"the run began with the tasks {sorted(tasks)}; now they are {sorted(names)}. "
            "Set them back, or start a new run."
        )
    for store in stores:
        depended_on = tasks[store.task.name][1]
        for what, now in store.depends_on.items():
            if depended_on.get(what) != now:
                raise DataError(
                    f"the {what.replace('_', ' ')} of task {store.task.name!r} has changed since the run began, from "
                    f"{depended_on.get(what)} to {now}, so the samples would be other ones. "
                    f"{_REMEDY.get(what, 'Set it back')}, or start a new run."
                )
    return [tasks[name][0] for name in names]
