"""The config of the mesh: the devices as a grid, and which of its axes split what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pippin.core.config import REQUIRED, Config, Required, nearest
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


def require_logical_axis(name: str) -> None:
    """Raises `ShardingError` naming the nearest, unless there is such a logical axis."""
    if name not in LOGICAL_AXES:
        raise ShardingError(
            f"unknown logical axis {name!r}{nearest(name, LOGICAL_AXES)}. "
            f"Use one of {', '.join(LOGICAL_AXES)}, or None for a dim that is never split."
        )


class AxisRuleConfig(Config):
    """One logical axis and the mesh axes that split it, outermost first."""

    logical: Required[str] = REQUIRED
    mesh: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.logical is not REQUIRED:
            require_logical_axis(self.logical)
        for axis in self.mesh:
            if axis not in MESH_AXES:
                raise ShardingError(
                    f"unknown mesh axis {axis!r}{nearest(axis, MESH_AXES)}. Use one of {', '.join(MESH_AXES)}."
                )


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
        named = [rule.logical for rule in self.rules]
        twice = sorted({name for name in named if named.count(name) > 1 and name is not REQUIRED})
        if twice:
            raise ShardingError(
                f"MeshConfig.rules has several rules for {', '.join(twice)}: a logical axis has one. Put all mesh "
                "axes into it."
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

    def ways(self, axis: str, shape: Mapping[str, int]) -> int:
        """Into how many parts a mesh of some shape splits a dim of a logical axis."""
        rule = next((rule.mesh for rule in self.rules if rule.logical == axis), ())
        return math.prod(shape[a] for a in rule)

    def make(
        self,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ) -> jax.sharding.Mesh:
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

        by_name = {rule.logical: rule.mesh for rule in self.rules}
        used: set[str] = set()
        parts: list[tuple[str, ...] | None] = []
        for axis in axes:
            if axis is not None:
                require_logical_axis(axis)
            # A mesh axis splits one dim of an array: the first that asks for it.
            mesh = tuple(a for a in by_name.get(axis or "", ()) if a not in used)
            used.update(mesh)
            parts.append(mesh or None)
        return PartitionSpec(*parts)

    def sharding(
        self, mesh: jax.sharding.Mesh, axes: Sequence[str | None], shape: Sequence[int]
    ) -> jax.sharding.NamedSharding:
        """How an array of a shape, whose dims are these logical axes, lies on a mesh.

        Raises:
            ShardingError: an axis is unknown, or the mesh does not divide a dim.
        """
        from jax.sharding import NamedSharding

        if len(axes) != len(shape):
            raise ShardingError(
                f"an array of shape {tuple(shape)} got the logical axes {tuple(axes)}: it has one for each dim. "
                "Write None for a dim that is never split."
            )
        spec = self.spec(axes)
        for axis, size, part in zip(axes, shape, spec, strict=True):
            split = (part,) if isinstance(part, str) else part or ()  # a PartitionSpec writes one name alone
            ways = math.prod(mesh.shape[a] for a in split)
            if size % ways:
                raise ShardingError(
                    f"a dim of {size} on the logical axis {axis!r} cannot be split {ways} ways, over the mesh axes "
                    f"{', '.join(split)} (the array's shape is {tuple(shape)}). Make the dim a multiple of {ways}, "
                    "make the mesh smaller, or change the rule of the axis."
                )
        return NamedSharding(mesh, spec)
