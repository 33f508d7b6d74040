"""Sharding of activations: layers name what a dim is; the mesh in use says what splits it."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pippin.core.mesh_config import (
    LOGICAL_AXES,
    MESH_AXES,
    AxisRuleConfig,
    MeshConfig,
    mesh_axes_of,
    require_even,
    require_logical_axis,
)

if TYPE_CHECKING:
    import jax

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "AxisRuleConfig",
    "MeshConfig",
    "constrain",
    "mesh_axes_of",
    "mesh_in_use",
    "num_shards",
    "on_shards",
    "platform_in_use",
    "shard_spec",
    "use_mesh",
]

_active: contextvars.ContextVar[tuple[MeshConfig, jax.sharding.Mesh] | None] = contextvars.ContextVar(
    "mesh", default=None
)


@contextlib.contextmanager
def use_mesh(cfg: MeshConfig, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Inside the block, `constrain` splits activations over this mesh."""
    token = _active.set((cfg, mesh))
    try:
        yield
    finally:
        _active.reset(token)


def mesh_in_use() -> tuple[MeshConfig, jax.sharding.Mesh] | None:
    """The mesh of the `use_mesh` block that runs now: for layers that split their work themselves."""
    return _active.get()


def platform_in_use() -> str:
    """That of the mesh in use, whose devices need not be here, or of this process: "cpu", "gpu" or "tpu"."""
    import jax

    active = _active.get()
    name = jax.default_backend() if active is None else active[1].devices.flat[0].platform
    return "gpu" if name == "cuda" else name


def num_shards(*axes: str) -> int:
    """Into how many parts the mesh in use splits what has these logical axes; 1 where no mesh is in use.

    Inside `on_shards`, what it has split already does not count: the parts are whole there.
    """
    active = _active.get()
    if active is None:
        return 1
    return math.prod(active[1].shape[a] for part in shard_spec(axes) for a in mesh_axes_of(part))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, split over the mesh in use as its logical axes say; unchanged where no mesh is in use.

    Raises:
        ShardingError: an axis is unknown, or the mesh does not divide a dim.
    """
    for axis in axes:
        if axis is not None:
            require_logical_axis(axis)
    active = mesh_in_use()
    if active is None:
        return x
    import jax

    spec, mesh = shard_spec(axes), active[1]
    require_even(mesh.shape, spec, axes, x.shape)
    # A part that `on_shards` made lies on the mesh that is left of the whole one.
    left = jax.sharding.get_abstract_mesh() if _split_already() else mesh
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(left, spec))


def shard_spec(axes: Sequence[str | None], over: Sequence[str] = MESH_AXES) -> jax.sharding.PartitionSpec:
    """How the mesh in use splits an array with these logical axes over some mesh axes, but for those split already."""
    from jax.sharding import PartitionSpec

    active = _active.get()
    if active is None:
        return PartitionSpec(*(None for _ in axes))
    free = frozenset(over) - _split_already()
    parts = (tuple(a for a in mesh_axes_of(part) if a in free) for part in active[0].spec(axes))
    return PartitionSpec(*(part or None for part in parts))


def on_shards(
    f: Callable[..., Any], in_specs: Any, out_specs: Any, over: Sequence[str] = MESH_AXES
) -> Callable[..., Any]:
    """`f`, run on each device with its part of the arguments; `f` itself where there is nothing to split.

    Within `f`, collectives (`jax.lax.psum`, `ppermute`) may name the mesh axes `over`, unless these have one device
    together (`num_shards` tells). The compiler goes on splitting over the others. Calls nest, over other axes each. The
    caller sees to it that the parts are of one size.

    Args:
        f: the function.
        in_specs: the `shard_spec` of each argument, or a tree of them for a tree of arrays.
        out_specs: of the results, likewise.
        over: the mesh axes whose parts `f` sees.
    """
    active = _active.get()
    free = [a for a in over if active is not None and a not in _split_already()]
    if active is None or math.prod(active[1].shape[a] for a in free) == 1:
        return f
    import jax

    # Nested calls take the mesh that is left of the whole one from the call around them.
    mesh = {} if _split_already() else {"mesh": active[1]}
    return jax.shard_map(
        f, **mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(free), check_vma=False
    )


def _split_already() -> frozenset[str]:
    """The mesh axes that the `on_shards` around the code that is traced has split over."""
    import jax

    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)
