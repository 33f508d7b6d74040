"""Linear maps with many adapters, of which each row of a batch has its own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.adapter import LowRank
from pippin.core.module import Module, Params, constant_init, parameter
from pippin.layers.linear_config import MultiLoRALinearConfig

_FLOAT32 = jnp.dtype(jnp.float32)
_SLOTS, _DOWN, _UP, _BASE = "slots", "down", "up", "base"


class MultiLoRALinear(Module):
    """Computes `base(x) + x @ down[i] @ up[i]`, where `i` is the adapter of the row of the batch that x is in.

    The products are of segments: the tokens of a row, which have one adapter. Adapter 0 is none: its maps are zero, and
    adding zero changes no number. Which adapter each row has is a parameter, set by `assign_adapters`, so that what holds linear maps knows nothing of it.

    Source: Chen et al. 2023, arXiv:2310.18547, sections 3 and 4 (Punica: a batched product of gathered low-rank maps,
    and one of segments).
    """

    Config = MultiLoRALinearConfig

    def __init__(self, cfg: MultiLoRALinearConfig, *, rngs: nnx.Rngs):
        ends = ("input_dim", "input_axis", "output_dim", "output_axis")
        self.base = cfg.base.set(**{name: getattr(cfg, name) for name in ends}).build(rngs=rngs)
        shape, axes = (1 + cfg.num_adapters, cfg.input_dim, cfg.rank), (None, cfg.input_axis, None)
        self.down = parameter(constant_init(0.0), rngs, shape, axes, fan_in=cfg.input_dim)
        shape, axes = (1 + cfg.num_adapters, cfg.rank, cfg.output_dim), (None, None, cfg.output_axis)
        self.up = parameter(constant_init(0.0), rngs, shape, axes, fan_in=cfg.rank)
        self.slots = nnx.Param(jnp.zeros((0,), jnp.int32), axes=(None,))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y, slots = self.base(x), self.slots[...]  # of the first dim of x, if there are any
        if slots.shape[0] == 0:
            return y
        segments = x.reshape(x.shape[0], -1, x.shape[-1])
        down, up = (a[...].astype(x.dtype) for a in (self.down, self.up))
        added = jax.lax.platform_dependent(segments, slots, down, up, cpu=_one_by_one, default=_gathered)
        return y + added.reshape(y.shape)


def _gathered(x: Array, slots: Array, down: Array, up: Array) -> Array:
    """The low-rank products of all rows, each with its own adapter's copy of the maps."""
    return x @ down[slots] @ up[slots]


def _one_by_one(x: Array, slots: Array, down: Array, up: Array) -> Array:
    """The low-rank products of one row after the other, of those that have an adapter.

    On a CPU, a batched product of copies takes up to 5 times as long. A row's numbers do not depend on how many rows
    there are, since no product is of several.
    """

    def of_row(row: tuple[Array, Array]) -> Array:
        x, slot = row
        none = jnp.zeros((x.shape[0], up.shape[-1]), x.dtype)
        return jax.lax.cond(slot > 0, lambda: (x @ down[slot]) @ up[slot], lambda: none)

    return jax.lax.map(of_row, (x, slots))


def assign_adapters(params: Params, slots: Int[Array, " B"]) -> Params:
    """The parameters of a model in which row i of a batch has the adapter `slots[i]`; 0: none.

    With no slots at all, no row has one, and nothing is computed for them.
    """

    def assign(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if _SLOTS in node:
            node = {**node, _SLOTS: slots}
        return {name: assign(value) for name, value in node.items()}

    return assign(params)


def with_adapter(params: Params, index: int, maps: Mapping[str, LowRank]) -> Params:
    """The parameters of a model that has some low-rank maps as its adapter `index`, instead of what it had there.

    Args:
        params: of a model without stacks, whose linear maps are all of this kind.
        index: from 1.
        maps: by the dotted path of the linear map. Their rank is the model's or less. A map that has none adds nothing.
    """
    return _with_adapter(params, index, maps, "")


def _with_adapter(node: Any, index: int, maps: Mapping[str, LowRank], path: str) -> Any:
    if not isinstance(node, Mapping):
        return node
    if _SLOTS not in node:
        return {
            name: _with_adapter(value, index, maps, f"{path}.{name}".removeprefix("."))
            for name, value in node.items()
        }
    down, up = node[_DOWN], node[_UP]
    of_down, of_up = np.zeros(down.shape[1:], np.float32), np.zeros(up.shape[1:], np.float32)
    if path in maps:
        rank = maps[path].down.shape[-1]
        of_down[:, :rank], of_up[:rank] = maps[path]
    return {
        **node,
        _DOWN: down.at[index].set(of_down.astype(down.dtype)),
        _UP: up.at[index].set(of_up.astype(up.dtype)),
    }


def adapter_shapes(params: Mapping[str, Any], path: str = "") -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear map that an adapter may change, by its dotted path."""
    if _SLOTS in params:
        return {path: (params[_DOWN].shape[1], params[_UP].shape[2])}
    found = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found |= adapter_shapes(value, f"{path}.{name}".removeprefix("."))
    return found


def with_room(params: Mapping[str, Any], shapes: Mapping[str, Any], dtype: jnp.dtype = _FLOAT32) -> Params:
    """Parameters of a model without adapters, as those of the same model with room for some.

    Args:
        params: of the linear maps themselves.
        shapes: the abstract parameters of the model with room.
        dtype: of the low-rank maps.
    """
    if _SLOTS in shapes:
        room = {name: jnp.zeros(shapes[name].shape, dtype) for name in (_DOWN, _UP)}
        return {**room, _SLOTS: jnp.zeros(shapes[_SLOTS].shape, jnp.int32), _BASE: params}
    return {
        name: with_room(params[name], shape, dtype) if isinstance(shape, Mapping) else params[name]
        for name, shape in shapes.items()
    }
