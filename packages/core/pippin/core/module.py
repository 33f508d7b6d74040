"""Modules: what configs build. Their parameters, as a tree of arrays and as a tree of facts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from pippin.core.config import Configurable
from pippin.core.errors import ConfigError
from pippin.core.mesh_config import require_logical_axis

# Logical axes of stacks: a parameter of n layers or tracks is n parameters, one after the other.
STACK_AXES = ("layers", "tracks")


class Module(nnx.Module, Configurable):
    """The base of all layers: an `nnx.Module` that is built from its `Config`."""


Params = dict[str, Any]  # attribute name -> Params or jax.Array


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """What is known of a parameter beside its values. Rules for parameters go by these, not by the path."""

    path: str  # for messages and files, such as decoder.layer.attention.q_proj.weight
    owners: tuple[str, ...]  # the types of the components that hold it, from the root to the innermost
    provides: tuple[str, ...]  # the interfaces that the owners provide, in the same order
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]  # the logical axis of each dim

    @property
    def stacked(self) -> int:
        """How many leading dims are stacks of parameters of one kind."""
        return next((i for i, axis in enumerate(self.axes) if axis not in STACK_AXES), len(self.axes))

    def last_axes(self, ndim: int) -> tuple[str | None, ...]:
        """Those of the last dims: in a loop over a stack, of one layer's array, whose axes still name the stack."""
        return self.axes[len(self.axes) - ndim :]


def parameter(
    init: Callable[..., Array],
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    fan_in: int,
) -> nnx.Param[Array]:
    """A new float32 parameter.

    Args:
        init: called with a key, the shape and `fan_in`.
        rngs: the source of the key.
        shape: of the parameter.
        axes: the logical axis of each dim; None for a dim that is never sharded.
        fan_in: how many inputs each output sums over.

    Raises:
        ConfigError: there is not one axis for each dim.
        ShardingError: an axis is unknown.
    """
    if len(axes) != len(shape):
        raise ConfigError(
            f"a parameter of shape {shape} got the logical axes {axes}: it has one for each dim. Write None for "
            "a dim that is never split."
        )
    for axis in axes:
        if axis is not None:
            require_logical_axis(axis)
    return nnx.Param(init(rngs.params(), shape, fan_in), axes=axes)


def constant_init(value: float) -> Callable[..., Array]:
    """An initialiser for `parameter` that ignores the key."""
    return lambda key, shape, fan_in: jnp.full(shape, value, jnp.float32)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module as its definition (hashable, no arrays) and its parameters (nested dicts of arrays).

    Raises:
        ConfigError: the module holds state that is not a parameter.
    """
    definition, state, rest = nnx.split(module, nnx.Param, ...)
    others = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]
    if others:
        raise ConfigError(
            f"{type(module).__name__} holds state that is not a parameter: {', '.join(others)}. Make it a "
            "`parameter`, keep constants as Python numbers, and return what changes from call to call."
        )
    return definition, _named(nnx.to_pure_dict(state))


def merge(definition: nnx.GraphDef, params: Params) -> Any:
    """The module that `split` took apart, with these parameters."""
    return nnx.merge(definition, _numbered(params))


def parameter_infos(module: nnx.Module) -> dict[str, Any]:
    """The facts of each parameter, in a tree of the shape of `split(module)[1]`.

    The module may be abstract: made by `nnx.eval_shape`.

    Raises:
        ConfigError: a parameter has no logical axes.
    """
    graph = {path: node for path, node in nnx.iter_graph(module)}
    infos: dict[str, Any] = {}
    for path, node in sorted(
        ((p, n) for p, n in graph.items() if isinstance(n, nnx.Param)), key=lambda i: str(i[0])
    ):
        prefixes = (graph.get(path[:i]) for i in range(len(path)))
        # A module that nobody configures is a part of the one that made it.
        configs = [getattr(type(m), "Config", None) for m in prefixes if isinstance(m, Module)]
        owners = [c for c in configs if c is not None]
        *above, name = (str(step) for step in path)
        at = infos
        for step in above:
            at = at.setdefault(step, {})
        value, dotted = node.get_value(), ".".join([*above, name])
        axes = node.get_metadata().get("axes")
        if axes is None:
            raise ConfigError(
                f"the parameter {dotted} has no logical axes, so no mesh knows how to split it. Make it with "
                "pippin.core.module.parameter."
            )
        at[name] = ParameterInfo(
            path=dotted,
            owners=tuple(c.TYPE for c in owners),
            provides=tuple(c.PROVIDES for c in owners),
            shape=tuple(value.shape),
            dtype=value.dtype,
            axes=tuple(axes),
        )
    return infos


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path, such as `decoder.layer.norm.scale`, in the order of the tree."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten_params(value, path + "."))
        else:
            flat[path] = value
    return flat


def unflatten_params(flat: Mapping[str, Any]) -> Params:
    """The tree of `flatten_params`."""
    params: Params = {}
    for path, value in flat.items():
        *above, name = path.split(".")
        at = params
        for step in above:
            at = at.setdefault(step, {})
        at[name] = value
    return params


def _named(tree: Any) -> Any:
    """List indices as strings, so that every container is a dict with string keys."""
    return {str(k): _named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _numbered(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdecimal() else k: _numbered(v) for k, v in tree.items()}
