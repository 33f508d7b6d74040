"""Logical axes and meshes: layers name what a dim is; rules say which mesh axes split it."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pippin.core.config import Config, nearest
from pippin.core.errors import ShardingError

if TYPE_CHECKING:
    import jax

# What a dim of a parameter or an activation can be.
LOGICAL_AXES = (
    "batch",  # sequences
    "sequence",  # tokens of a sequence
    "embed",  # the model dim of a weight
    "vocab",
    "heads",  # query heads times the head dim
    "kv_heads",  # key and value heads times the head dim
    "mlp",  # the hidden dim of a feed-forward
    "experts",
    "layers",  # the stack that a scan goes over
    "tracks",
)

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor", "pipeline")


def _require(name: str, names: Sequence[str], what: str) -> None:
    if name not in names:
        raise ShardingError(
            f"unknown {what} {name!r}{nearest(name, list(names))}. Use one of {', '.join(names)}, "
            "or add it to pippin.core.sharding with its meaning."
        )


class AxisRuleConfig(Config):
    """One logical axis and the mesh axes that split it, outermost first."""

    logical: str = ""
    mesh: tuple[str, ...] = ()

    def validate(self) -> None:
        _require(self.logical, LOGICAL_AXES, "logical axis")
        for axis in self.mesh:
            _require(axis, MESH_AXES, "mesh axis")


def _default_rules() -> tuple[AxisRuleConfig, ...]:
    rules: dict[str, tuple[str, ...]] = {
        "batch": ("data", "fsdp"),
        "sequence": ("sequence",),
        "vocab": ("tensor",),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "experts": ("expert",),
    }
    return tuple(AxisRuleConfig(logical=k, mesh=v) for k, v in rules.items())


class MeshConfig(Config):
    """The devices as a grid. At most one size is -1: all the devices that the others leave.

    A logical axis without a rule is not split.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    pipeline: int = 1
    rules: tuple[AxisRuleConfig, ...] = _default_rules()

    def validate(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if sum(s == -1 for s in sizes.values()) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
            raise ShardingError(
                f"MeshConfig got {sizes}: every size must be positive, and at most one -1. "
                "Write -1 only for the axis that takes the remaining devices."
            )

    def shape(self, num_devices: int) -> dict[str, int]:
        """The size of each mesh axis on some devices.

        Raises:
            ShardingError: the sizes do not divide the devices.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(s for s in sizes.values() if s != -1)
        free = [axis for axis, s in sizes.items() if s == -1]
        if num_devices % fixed or (not free and fixed != num_devices):
            raise ShardingError(
                f"a mesh of {sizes} does not fit {num_devices} devices: its sizes multiply to {fixed}, which must "
                f"{'divide' if free else 'equal'} the number of devices. Change a size, or write -1 for one axis."
            )
        return {axis: num_devices // fixed if s == -1 else s for axis, s in sizes.items()}

    def make(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over some devices, by default all.

        Raises:
            ShardingError: the sizes do not divide the devices.
        """
        import jax

        devices = list(jax.devices() if devices is None else devices)
        shape = self.shape(len(devices))
        auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
        return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=auto, devices=devices)

    def spec(self, axes: Sequence[str | None]) -> jax.sharding.PartitionSpec:
        """The partition of an array whose dims are these logical axes.

        Raises:
            ShardingError: an axis is unknown.
        """
        from jax.sharding import PartitionSpec

        by_name: Mapping[str, tuple[str, ...]] = {rule.logical: rule.mesh for rule in self.rules}
        used: set[str] = set()
        parts: list[tuple[str, ...] | None] = []
        for axis in axes:
            if axis is not None:
                _require(axis, LOGICAL_AXES, "logical axis")
            # A mesh axis splits one dim of an array: the first that asks for it.
            mesh = tuple(a for a in by_name.get(axis or "", ()) if a not in used)
            used.update(mesh)
            parts.append(mesh or None)
        return PartitionSpec(*parts)


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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, split over the mesh in use as its logical axes say; unchanged where no mesh is in use."""
    active = _active.get()
    if active is None:
        return x
    import jax

    cfg, mesh = active
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, cfg.spec(axes)))
