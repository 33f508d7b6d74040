"""Sharding of activations: layers name what a dim is; the mesh in use says what splits it."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pippin.core.mesh_config import (
    LOGICAL_AXES,
    MESH_AXES,
    AxisRuleConfig,
    MeshConfig,
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
    "mesh_in_use",
    "num_shards",
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


def num_shards(*axes: str) -> int:
    """Into how many parts the mesh in use splits what has these logical axes; 1 where no mesh is in use."""
    active = _active.get()
    if active is None:
        return 1
    cfg, mesh = active
    return math.prod(
        mesh.shape[a] for part in cfg.spec(axes) for a in ((part,) if isinstance(part, str) else part or ())
    )


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

    cfg, mesh = active
    return jax.lax.with_sharding_constraint(x, cfg.sharding(mesh, axes, x.shape))
