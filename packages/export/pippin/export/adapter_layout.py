"""Where the low-rank maps of an adapter lie in the one flat input that a program takes them from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pippin.core.adapter import Adapter, LowRank, load_adapter
from pippin.core.errors import CheckpointError, ConfigError
from pippin.v1 import export_pb2 as pb

SIGNATURE_CHARS = 64  # that the file of an adapter begins with

_LINEAR = re.compile(r"(decoder\..+)\.weight")


def open_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory.

    Raises:
        CheckpointError: there is no such directory, or no adapter in it.
        DamageError: files of it are absent or not as they were written.
    """
    if not Path(directory).is_dir():
        raise CheckpointError(
            f"there is no adapter {directory}: {'it is no directory' if Path(directory).exists() else 'no such directory'}. "
            "Give one that //packages/layers:adapter wrote."
        )
    for file, what in (("trainer.textproto", "run"), ("model.safetensors", "model")):
        if (Path(directory) / file).exists():
            raise CheckpointError(
                f"{directory} is a {what}, and no adapter. `//packages/layers:adapter --model {directory} --out NAME` writes the "
                "adapter of one that was trained with LoRA: give that."
            )
    return load_adapter(directory)


def adapter_layout(shapes: Mapping[str, tuple[int, ...]], rank: int, base_signature: str) -> pb.AdapterLayout:
    """Room for an adapter of every linear map of a model's layers.

    Args:
        shapes: of the weights of the model without stacks, by name.
        rank: of the largest adapter that is to fit.
        base_signature: of the model; see model.proto.

    Raises:
        ConfigError: the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(
            f"the adapter rank is {rank}; it must be at least 1. Leave it out for a package that takes no adapters."
        )
    layout = pb.AdapterLayout(rank=rank, base_signature=base_signature)
    for name in sorted(shapes, key=_in_order):
        match = _LINEAR.fullmatch(name)
        if match and len(shapes[name]) == 2:
            inputs, outputs = shapes[name]
            for end, shape in (("down", (inputs, rank)), ("up", (rank, outputs))):
                layout.slots.add(name=f"{match[1]}.{end}", offset=layout.length, shape=shape)
                layout.length += shape[0] * shape[1]
    return layout


def require_base(adapter: Adapter, layout: pb.AdapterLayout) -> None:
    """Raises CheckpointError unless an adapter was trained on the weights of a package."""
    if adapter.base_signature != layout.base_signature:
        raise CheckpointError(
            f"the adapter {adapter.directory} was trained on the model with the signature {adapter.base_signature[:12]}; "
            f"this package holds {layout.base_signature[:12]}. An adapter fits the weights that it was trained on, and no "
            "others: export its base, or train it on this one."
        )


def packed_adapter(adapter: Adapter, maps: Mapping[str, LowRank], layout: pb.AdapterLayout) -> np.ndarray:
    """An adapter as the flat input of a program: float16 [N].

    Args:
        adapter: as it was opened; see `require_base`.
        maps: its maps by the path of their linear map in the model without stacks.
        layout: the program's.

    Raises:
        CheckpointError: it is larger than there is room for, or it is for a linear map that has no room.
    """
    slots = {slot.name: slot for slot in layout.slots}
    flat = np.zeros(layout.length, np.float16)
    for path, pair in maps.items():
        if f"{path}.down" not in slots:
            known = ", ".join(
                sorted({slot.name.split(".", 3)[-1].rpartition(".")[0] for slot in layout.slots})
            )
            raise CheckpointError(
                f"the adapter {adapter.directory} has maps for {path}, for which the package has no room. It has some for "
                f"these of each layer: {known}."
            )
        rank = pair.down.shape[-1]
        if rank > layout.rank:
            raise CheckpointError(
                f"the adapter {adapter.directory} has rank {rank}; the package has room for {layout.rank}. Export it with "
                f"--adapter-rank {rank}."
            )
        for end, values in (("down", pair.down), ("up", pair.up)):
            slot = slots[f"{path}.{end}"]
            room = flat[slot.offset : slot.offset + slot.shape[0] * slot.shape[1]].reshape(tuple(slot.shape))
            _require_fit(adapter, f"{path}.{end}", values.shape, tuple(slot.shape), 1 if end == "down" else 0)
            with np.errstate(over="ignore"):  # infinities are looked for below
                room[: values.shape[0], : values.shape[1]] = values
    if not np.isfinite(flat).all():
        raise CheckpointError(
            f"the adapter {adapter.directory} has numbers beyond {np.finfo(np.float16).max}, the largest of float16. "
            "Export one from an earlier step of its training."
        )
    return flat


def adapter_file(flat: np.ndarray, layout: pb.AdapterLayout) -> bytes:
    """The file of an adapter: the signature of the model that it is for, in ASCII, and the flat input behind it."""
    assert len(layout.base_signature) == SIGNATURE_CHARS
    return layout.base_signature.encode("ascii") + flat.astype("<f2").tobytes()


def _require_fit(
    adapter: Adapter, name: str, shape: Iterable[int], room: tuple[int, ...], rank_dim: int
) -> None:
    shape = tuple(shape)
    if len(shape) != 2 or shape[1 - rank_dim] != room[1 - rank_dim]:
        raise CheckpointError(
            f"the adapter {adapter.directory}: {name} is {list(shape)}; the package has {list(room)} for it. Export it "
            "again from the model that it was trained with."
        )


def _in_order(name: str) -> list[str | int]:
    """Names by layer, the tenth behind the ninth."""
    return [int(part) if part.isdecimal() else part for part in name.split(".")]
