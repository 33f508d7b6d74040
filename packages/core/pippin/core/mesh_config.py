"""The config of the mesh: the devices as a grid, and which of its axes split what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

# From the axis whose devices exchange least to the one that needs the nearest neighbours.
MESH_AXES = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")


def require_logical_axis(name: str) -> None:
    """Raises `ShardingError` naming the nearest, unless there is such a logical axis."""
    if name not in LOGICAL_AXES:
        raise ShardingError(
            f"unknown logical axis {name!r}{nearest(name, LOGICAL_AXES)}. "
            f"Use one of {', '.join(LOGICAL_AXES)}, or None for a dim that is never split."
        )


def require_mesh_axis(name: str) -> None:
    """Raises `ShardingError` naming the nearest, unless there is such a mesh axis."""
    if name not in MESH_AXES:
        raise ShardingError(
            f"unknown mesh axis {name!r}{nearest(name, MESH_AXES)}. Use one of {', '.join(MESH_AXES)}."
        )


class AxisRuleConfig(Config):
    """One logical axis and the mesh axes that split it, outermost first."""

    logical: Required[str] = REQUIRED
    mesh: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.logical is not REQUIRED:
            require_logical_axis(self.logical)
        for axis in self.mesh:
            require_mesh_axis(axis)


def _default_rules() -> tuple[AxisRuleConfig, ...]:
    rules: dict[str, tuple[str, ...]] = {
        # Devices that hold different experts have different rows too: tokens go to their experts and back.
        "batch": ("data", "fsdp", "expert"),
        "sequence": ("sequence",),
        "vocab": ("tensor",),
        "embed": ("fsdp", "expert"),  # of an expert's weight, which "experts" has split before: fsdp alone
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "experts": ("expert",),
        "layers": ("pipeline",),
    }
    return tuple(AxisRuleConfig(logical=k, mesh=v) for k, v in rules.items())


class MeshConfig(Config):
    """The devices as a grid. At most one size is -1: all the devices that the others leave.

    A logical axis without a rule is not split.

    Devices of several slices (TPU slices, nodes of GPUs, machines of CPUs), between which the network is slow, make
    a hybrid mesh: the axes in `across` are divided over the slices, in this order, and all others stay inside one.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    pipeline: int = 1
    across: tuple[str, ...] = ("data", "pipeline", "fsdp")
    rules: tuple[AxisRuleConfig, ...] = _default_rules()

    def validate(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if sum(s == -1 for s in sizes.values()) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
            raise ShardingError(
                f"MeshConfig got {sizes}: every size must be positive, and at most one -1. "
                "Write -1 only for the axis that takes the remaining devices."
            )
        for axis in self.across:
            require_mesh_axis(axis)
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
        *,
        process_is_slice: bool | None = None,
    ) -> jax.sharding.Mesh:
        """The mesh over some devices, by default all.

        Args:
            devices: JAX's.
            process_is_slice: whether the devices of a process are a slice; None: as JAX has it, but of CPUs they are.

        Raises:
            ShardingError: the sizes do not divide the devices.
        """
        import jax

        devices = list(jax.devices() if devices is None else devices)
        shape = self.shape(len(devices))
        auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
        by_process = bool(devices[0].platform == "cpu" if process_is_slice is None else process_is_slice)
        slices = num_slices(devices, by_process)
        if slices == 1:
            return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=auto, devices=devices)
        from jax.experimental.mesh_utils import create_hybrid_device_mesh

        outside = self.shape_across(shape, slices)
        grid = create_hybrid_device_mesh(
            [shape[axis] // outside[axis] for axis in MESH_AXES],
            [outside[axis] for axis in MESH_AXES],
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=auto)

    def shape_across(self, shape: Mapping[str, int], slices: int) -> dict[str, int]:
        """Into how many parts, of a mesh's shape, each axis lies over several slices.

        Raises:
            ShardingError: the axes in `across` do not divide the slices.
        """
        parts: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
        left = slices
        for axis in self.across:
            parts[axis] = math.gcd(shape[axis], left)
            left //= parts[axis]
        if left > 1:
            sizes = ", ".join(f"{axis}={shape[axis]}" for axis in self.across)
            raise ShardingError(
                f"the devices are of {slices} slices, and the axes that may cross slices ({sizes}) take up "
                f"{slices // left} of them. Make their product a multiple of {slices}, or name more axes in mesh.across."
            )
        return parts

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

        spec = self.spec(axes)
        require_even(mesh.shape, spec, axes, shape)
        return NamedSharding(mesh, spec)


def mesh_axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that split one dim, as a partition has it: one alone is a name by itself."""
    return (part,) if isinstance(part, str) else part or ()


def require_even(
    mesh: Mapping[str, int],
    spec: jax.sharding.PartitionSpec,
    axes: Sequence[str | None],
    shape: Sequence[int],
) -> None:
    """Raises `ShardingError` unless a mesh of some sizes divides every dim of an array that it splits."""
    if len(axes) != len(shape):
        raise ShardingError(
            f"an array of shape {tuple(shape)} got the logical axes {tuple(axes)}: it has one for each dim. "
            "Write None for a dim that is never split."
        )
    for axis, size, part in zip(axes, shape, spec, strict=True):
        split = mesh_axes_of(part)
        ways = math.prod(mesh[a] for a in split)
        if size % ways:
            raise ShardingError(
                f"a dim of {size} on the logical axis {axis!r} cannot be split {ways} ways, over the mesh axes "
                f"{', '.join(split)} (the array's shape is {tuple(shape)}). Make the dim a multiple of {ways}, "
                "make the mesh smaller, or change the rule of the axis."
            )


def num_slices(devices: Sequence[Any], process_is_slice: bool = False) -> int:
    """How many groups with fast links JAX's devices are in: TPU slices, nodes of GPUs, machines of CPUs."""
    if process_is_slice:
        return len({d.process_index for d in devices})
    return len({getattr(d, "slice_index", 0) or 0 for d in devices})
