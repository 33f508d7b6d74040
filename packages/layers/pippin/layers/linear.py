"""Linear maps and embeddings, and how they start."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.module import Module, constant_init, parameter
from pippin.layers.linear_config import (
    EmbeddingConfig,
    FanInInitConfig,
    GroupedLinearConfig,
    LinearConfig,
    LoRALinearConfig,
    NormalInitConfig,
)

_FLOAT32 = jnp.dtype(jnp.float32)


class FanInInit:
    """Draws float32 values from N(0, scale / fan_in)."""

    Config = FanInInitConfig

    def __init__(self, cfg: FanInInitConfig):
        self.scale = cfg.scale

    def __call__(self, key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
        return jax.random.normal(key, shape, jnp.float32) * (self.scale / fan_in) ** 0.5


class NormalInit:
    """Draws float32 values from N(0, stddev^2)."""

    Config = NormalInitConfig

    def __init__(self, cfg: NormalInitConfig):
        self.stddev = cfg.stddev

    def __call__(self, key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
        return jax.random.normal(key, shape, jnp.float32) * self.stddev


class Linear(Module):
    """Computes `x @ weight + bias` in the dtype of `x`."""

    Config = LinearConfig

    def __init__(self, cfg: LinearConfig, *, rngs: nnx.Rngs):
        shape, axes = (cfg.input_dim, cfg.output_dim), (cfg.input_axis, cfg.output_axis)
        self.weight = parameter(cfg.init.build(), rngs, shape, axes, fan_in=cfg.input_dim)
        self.bias = parameter(constant_init(0.0), rngs, shape[1:], axes[1:], fan_in=1) if cfg.bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = x @ self.weight[...].astype(x.dtype)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


class LoRALinear(Module):
    """Computes `base(x) + alpha / rank * x @ down @ up`.

    `down` and `up` are its own parameters and the base's are not, so that a rule for
    what LoRALinear holds directly trains the low-rank map alone.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    Config = LoRALinearConfig

    def __init__(self, cfg: LoRALinearConfig, *, rngs: nnx.Rngs):
        ends = ("input_dim", "input_axis", "output_dim", "output_axis")
        self.base = cfg.base.set(**{name: getattr(cfg, name) for name in ends}).build(rngs=rngs)
        shape, axes = (cfg.input_dim, cfg.rank), (cfg.input_axis, None)
        self.down = parameter(FanInInitConfig().build(), rngs, shape, axes, fan_in=cfg.input_dim)
        shape, axes = (cfg.rank, cfg.output_dim), (None, cfg.output_axis)
        self.up = parameter(constant_init(0.0), rngs, shape, axes, fan_in=cfg.rank)
        self.scale = cfg.alpha / cfg.rank

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        low = x @ self.down[...].astype(x.dtype)
        return self.base(x) + self.scale * (low @ self.up[...].astype(x.dtype))


class GroupedLinear(Module):
    """Computes `x[i] @ weight[g]` for the rows i of each group g; no row is dropped or padded."""

    Config = GroupedLinearConfig

    def __init__(self, cfg: GroupedLinearConfig, *, rngs: nnx.Rngs):
        shape = (cfg.num_groups, cfg.input_dim, cfg.output_dim)
        axes = ("experts", cfg.input_axis, cfg.output_axis)
        self.weight = parameter(cfg.init.build(), rngs, shape, axes, fan_in=cfg.input_dim)

    def __call__(self, x: Float[Array, "M I"], group_sizes: Int[Array, " G"]) -> Float[Array, "M O"]:
        """The rows of `x` lie sorted by group; `group_sizes` counts the rows of each."""
        return jax.lax.ragged_dot(x, self.weight[...].astype(x.dtype), group_sizes)


class Embedding(Module):
    """Looks up a vector for each id; `attend` gives logits over the ids.

    The vector of an id beyond the vocabulary is NaN.
    """

    Config = EmbeddingConfig

    def __init__(self, cfg: EmbeddingConfig, *, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.dim)
        self.weight = parameter(cfg.init.build(), rngs, shape, ("vocab", "embed"), fan_in=cfg.dim)

    def __call__(self, ids: Int[Array, "*B"], dtype: jnp.dtype = _FLOAT32) -> Float[Array, "*B D"]:
        return jnp.take(self.weight[...], ids, axis=0).astype(dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return x @ self.weight[...].astype(x.dtype).T
