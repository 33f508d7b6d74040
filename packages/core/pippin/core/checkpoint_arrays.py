"""The arrays of a training state: written by Orbax, hashed on the way, and put back onto any sharding."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pippin.core.errors import CheckpointError
from pippin.core.stored_array import FOLDER, Index, StoredArray, array_sha256, chunk_file, read_all
from pippin.v1 import model_pb2 as pb

PyTree = Any
Bounds = tuple[tuple[int, int], ...]  # start and stop, one pair a dim


@dataclasses.dataclass(frozen=True)
class HostChunk:
    """A part of an array, in the host's memory, that this process writes."""

    name: str
    array_shape: tuple[int, ...]
    start: tuple[int, ...]
    values: np.ndarray


def name_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by dotted path: `params.decoder.norm.weight`, `learner.0.count`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def storable(tree: PyTree) -> dict[str, jax.Array]:
    """The leaves of a training state by name.

    Raises:
        CheckpointError: one of them is no array that can be stored.
    """
    arrays = name_leaves(tree)
    for name, leaf in arrays.items():
        if (
            not isinstance(leaf, jax.Array)
            or leaf.size == 0
            or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended)
        ):
            what = f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, jax.Array) else type(leaf).__name__
            raise CheckpointError(
                f"the state's {name} is {what}; a checkpoint holds JAX arrays of numbers that have values. Make it "
                "one (of a random key, jax.random.key_data), or leave it out of the state."
            )
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise CheckpointError(
                f"the state's {name} lies on this process's devices alone, and a checkpoint of several processes holds "
                "arrays of all of them. Make it with a sharding of the whole mesh, replicated if need be."
            )
    return arrays


def to_host(arrays: Mapping[str, jax.Array]) -> list[HostChunk]:
    """The parts of the arrays that this process writes, copied to the host: each shard is one process's.

    The copies stay with the shards, so that Orbax, which asks the same shards for
    their values, gets these and makes none of its own. Where the device's memory
    is the host's, as on a CPU, nothing is copied: JAX gives the buffer to no later
    computation as long as it is referred to here, donated or not.
    """
    owned = [(n, a.shape, s) for n, a in arrays.items() for s in a.addressable_shards if s.replica_id == 0]
    for _, _, shard in owned:
        shard.data.copy_to_host_async()
    return [
        HostChunk(name, shape, tuple(s.start or 0 for s in shard.index), np.asarray(shard.data))
        for name, shape, shard in owned
    ]


def start_writing(folder: Path, arrays: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Starts to write arrays below `folder`/arrays; what is returned, called, waits until they are there."""
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    # Not OCDBT, which has one database for all arrays: a damaged file is then one array's.
    pytree = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=registry,
        enable_pinned_host_transfer=False,
    )
    save = pytree.async_save(folder / FOLDER, args=ocp.args.PyTreeSave(dict(arrays)))  # type: ignore[arg-type]
    # In a thread: there may be a running event loop in this one, as in a notebook.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        commits = thread.submit(asyncio.run, save).result() or []

    def finish() -> None:
        for commit in commits:
            commit.result()

    return finish


def describe(chunks: Iterable[HostChunk]) -> list[pb.CheckpointArray]:
    """What the manifest says of the chunks of this process, one message each; the files' sizes are not set."""
    return [
        pb.CheckpointArray(
            name=c.name,
            dtype=str(c.values.dtype),
            shape=c.array_shape,
            chunks=[
                pb.ArrayChunk(
                    start=c.start,
                    shape=c.values.shape,
                    file=chunk_file(c.name, c.start, c.values.shape),
                    sha256=array_sha256(c.values),
                )
            ],
        )
        for c in chunks
    ]


def merge(folder: Path, described: Iterable[pb.CheckpointArray]) -> list[pb.CheckpointArray]:
    """What the manifest says of all arrays, from what all processes say of their chunks, once they are written.

    Raises:
        CheckpointError: a part of an array was not written.
    """
    arrays: dict[str, pb.CheckpointArray] = {}
    for one in sorted(described, key=lambda a: (a.name, *a.chunks[0].start)):
        chunk = one.chunks[0]
        chunk.bytes = (folder / chunk.file).stat().st_size
        if one.name in arrays:
            arrays[one.name].chunks.append(chunk)
        else:
            arrays[one.name] = one
    for array in arrays.values():
        written, whole = sum(math.prod(c.shape) for c in array.chunks), math.prod(array.shape)
        if written != whole:
            raise CheckpointError(f"{array.name} was written in part: {written} of its {whole} values.")
    return list(arrays.values())


def restore(
    folder: Path, entries: Iterable[pb.CheckpointArray], template: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The arrays of a step, checked, each on the devices that its template says.

    Args:
        folder: the step's.
        entries: what its manifest says of the arrays.
        template: by name, what has a shape, a dtype and, if it is not to be the first device, a sharding.

    Raises:
        CheckpointError: the step holds other arrays than the template.
        DamageError: files are not as they were written.
    """
    stored = {entry.name: StoredArray(folder, entry) for entry in entries}
    _require_same(folder, stored, template)
    shardings, places = {}, {}
    for name, leaf in template.items():
        shardings[name] = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        indices = shardings[name].addressable_devices_indices_map(leaf.shape)
        places[name] = {device: _bounds(index, leaf.shape) for device, index in indices.items()}
    # Devices that hold the same part of an array share one copy of it.
    wanted = {name: list(dict.fromkeys(place.values())) for name, place in places.items()}
    parts = read_all([(stored[name], [_slices(b) for b in bounds]) for name, bounds in wanted.items()])
    return {
        name: _place(
            template[name].shape, shardings[name], places[name], dict(zip(bounds, values, strict=True))
        )
        for (name, bounds), values in zip(wanted.items(), parts, strict=True)
    }


def _place(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    places: Mapping[Any, Bounds],  # device -> the part that it holds
    parts: Mapping[Bounds, np.ndarray],
) -> jax.Array:
    on_devices = [
        jax.device_put(
            parts[bounds], jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        )
        for device, bounds in places.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def _require_same(folder: Path, stored: Mapping[str, StoredArray], wanted: Mapping[str, Any]) -> None:
    problems = [f"it has no {name}" for name in wanted if name not in stored]
    problems += [f"its {name} is not in the state" for name in stored if name not in wanted]
    problems += [
        f"its {name} is {stored[name].dtype}{list(stored[name].shape)}, the state's {leaf.dtype}{list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and (stored[name].shape, stored[name].dtype) != (leaf.shape, leaf.dtype)
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(
            f"{folder} is of another model or learner: {shown}. Load it with the config that it was saved with."
        )


def _bounds(index: Index, shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _slices(bounds: Bounds) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)
