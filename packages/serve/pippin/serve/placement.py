"""Where a model lies that several devices share: each has its part of every layer."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from pippin.core.config import Config
from pippin.core.config_tree import transform, traverse
from pippin.core.errors import ShardingError
from pippin.core.mesh_config import AxisRuleConfig, MeshConfig, require_even
from pippin.core.module import Params, flatten_params, parameter_infos, unflatten_params
from pippin.core.sharding import use_mesh
from pippin.layers.attention_config import GroupedQueryAttentionConfig, SharedKVAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig

_AXIS = "tensor"
_ATTENTION = (GroupedQueryAttentionConfig, SharedKVAttentionConfig)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the model and the cache on it, split by the same rules as in training.

    Heads, the hidden dim of feed-forwards and the vocabulary are split; rows of a step are not.
    """

    config: MeshConfig
    mesh: jax.sharding.Mesh

    @property
    def ways(self) -> int:
        """How many devices there are."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """JAX's name of the kind of device."""
        return self.mesh.devices.flat[0].platform

    def block(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what is traced is for these devices."""
        return use_mesh(self.config, self.mesh)

    def sharding(self, array: Any, axes: Sequence[str | None]) -> jax.sharding.NamedSharding:
        """How an array lies whose dims are these logical axes."""
        return self.config.sharding(self.mesh, axes, array.shape)

    def everywhere(self) -> jax.sharding.NamedSharding:
        """How an array lies that each device has."""
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    def fit(self, cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
        """The same model with as many key heads as devices, where it has fewer: each is there several times.

        Args:
            cfg: a model's config.
            params: its parameters, NumPy's arrays.

        Raises:
            ShardingError: the devices cannot share the model, and how many could.
        """
        fitted = with_key_heads(cfg, self.ways)
        before, after = (flatten_params(_infos(c)) for c in (cfg, fitted))
        repeated = {}
        for name, values in flatten_params(params).items():
            if (shape := after[name].shape) != before[name].shape:
                dim = after[name].axes.index("kv_heads")
                values = _repeat_heads(values, dim, shape[dim] // values.shape[dim], _head_dim(cfg))
            repeated[name] = values
        return fitted, unflatten_params(repeated)

    def place(self, infos: Mapping[str, Any], params: Mapping[str, Any]) -> Params:
        """Parameters on the devices. Each gets its part of NumPy's array: none ever holds a whole one that is split."""

        def part(info: Any, values: Any) -> jax.Array:
            sharding = self.sharding(values, info.axes)
            return jax.make_array_from_callback(
                values.shape, sharding, lambda index: np.ascontiguousarray(values[index])
            )

        return jax.tree.map(part, dict(infos), dict(params))


def tensor_parallel(ways: int, cfg: CausalLMConfig, devices: Sequence[Any] | None = None) -> Placement:
    """The placement of a model on the first devices, of JAX's or of those given.

    Raises:
        ShardingError: there are not so many devices.
    """
    found = list(jax.devices() if devices is None else devices)
    if len(found) < ways:
        raise ShardingError(
            f"--tensor-parallel is {ways}, and JAX sees {len(found)} devices of the kind {found[0].platform}. Give "
            f"{len(found)} or less; on CPUs, XLA_FLAGS=--xla_force_host_platform_device_count={ways} makes more."
        )
    config = _mesh_config(ways, cfg)
    return Placement(config, config.make(found[:ways], process_is_slice=False))


def with_key_heads(cfg: CausalLMConfig, ways: int) -> CausalLMConfig:
    """The same model for so many devices: key heads that are fewer are repeated.

    Raises:
        ShardingError: so many devices cannot share the model, and how many could.
    """
    if reason := _why_not(cfg, ways):
        most = max(c.num_heads for _, c in traverse(cfg) if isinstance(c, _ATTENTION))
        good = [str(n) for n in range(1, most + 1) if not _why_not(cfg, n)]
        raise ShardingError(
            f"{ways} devices cannot share this model: {reason}. Set --tensor-parallel to {_listed(good)}."
        )

    def change(node: Config) -> Config:
        if isinstance(node, _ATTENTION) and node.num_kv_heads % ways:
            return node.set(num_kv_heads=ways)
        return node

    return transform(cfg, change)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _why_not(cfg: CausalLMConfig, ways: int) -> str:
    """Why so many devices cannot share a model; empty where they can."""
    for _, node in traverse(cfg):
        if not isinstance(node, _ATTENTION):
            continue
        if node.num_heads % ways:
            return f"they cannot have equal parts of {node.num_heads} heads"
        if node.num_kv_heads % ways and ways % node.num_kv_heads:
            return f"they can neither have equal parts of {node.num_kv_heads} key heads nor one each"
    config, sizes = _mesh_config(ways, cfg), {_AXIS: ways}
    for info in flatten_params(_infos(cfg)).values():
        axes = [None if axis == "kv_heads" else axis for axis in info.axes]  # which may be repeated
        try:
            require_even(_Sizes(sizes), config.spec(axes), axes, info.shape)
        except ShardingError:
            return f"they cannot have equal parts of {info.path}, whose shape is {info.shape}"
    return ""


class _Sizes(dict[str, int]):
    """Those of a mesh: 1 where nothing is said."""

    def __missing__(self, axis: str) -> int:
        return 1


def _mesh_config(ways: int, cfg: CausalLMConfig) -> MeshConfig:
    """A mesh of one axis. A vocabulary that it does not divide, as of odd sizes, lies on every device."""
    assert isinstance(cfg.vocab_size, int)
    config = MeshConfig(data=1, tensor=ways)
    if cfg.vocab_size % ways == 0:
        return config
    rules: tuple[AxisRuleConfig, ...] = tuple(rule for rule in config.rules if rule.logical != "vocab")
    return config.set(rules=rules)


def _infos(cfg: CausalLMConfig) -> dict[str, Any]:
    return parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))


def _head_dim(cfg: CausalLMConfig) -> int:
    """That of all layers with key heads.

    Raises:
        ShardingError: they have several.
    """
    found = {c.head_dim for _, c in traverse(cfg) if isinstance(c, GroupedQueryAttentionConfig)}
    if len(found) != 1:
        raise ShardingError(
            f"this model's heads are of several sizes ({', '.join(map(str, sorted(found)))}), and its key heads are "
            "fewer than the devices. Give --tensor-parallel a number that divides the key heads of every layer."
        )
    return found.pop()


def _repeat_heads(values: Any, dim: int, times: int, head_dim: int) -> Any:
    """An array with every head of a dim several times, one after the other."""
    shape = values.shape
    heads = values.reshape(*shape[:dim], shape[dim] // head_dim, head_dim, *shape[dim + 1 :])
    return heads.repeat(times, axis=dim).reshape(*shape[:dim], -1, *shape[dim + 1 :])
