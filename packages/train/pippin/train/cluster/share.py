"""Which part of each batch a process reads."""

import dataclasses

import jax

from pippin.core.mesh_config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Share:
    """The `index`-th of `count` equal parts of a batch's rows."""

    index: int = 0
    count: int = 1
    counts: bool = True  # False: an earlier process reads the same part, and speaks for it


def share_of_batch(cfg: MeshConfig, mesh: jax.sharding.Mesh, rows: int) -> Share:
    """The part of a batch that this process's devices hold.

    Processes whose devices hold the same rows, as where an axis that splits the model spans them, read the same part.
    Where devices of different processes hold overlapping rows, every process reads all.

    Args:
        cfg: says which axes split a batch.
        mesh: over the devices of all processes.
        rows: of a global batch.

    Raises:
        ShardingError: the rows cannot be split evenly.
    """
    held: dict[int, set[tuple[int, int]]] = {}  # process -> the spans of rows on its devices
    sharding = cfg.sharding(mesh, ("batch",), (rows,))
    for device, (span,) in sharding.devices_indices_map((rows,)).items():
        start, stop, _ = span.indices(rows)
        held.setdefault(device.process_index, set()).add((start, stop))
    parts = sorted({tuple(sorted(spans)) for spans in held.values()})
    sizes = {sum(stop - start for start, stop in part) for part in parts}
    me = jax.process_index()
    if len(sizes) > 1 or sizes.pop() * len(parts) != rows:
        return Share(counts=me == 0)
    mine = held[me]
    return Share(
        index=parts.index(tuple(sorted(mine))),
        count=len(parts),
        counts=me == min(process for process, spans in held.items() if spans == mine),
    )
