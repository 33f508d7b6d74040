"""Linear maps and embeddings whose weights are kept as int8: a quarter of the memory of float32, for models that are served."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.module import (
    Module,
    Params,
    constant_init,
    flatten_params,
    parameter,
    parameter_infos,
    unflatten_params,
)
from pippin.core.sharding import platform_in_use
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.int8 import MOST, quantized
from pippin.layers.linear_config import Int8EmbeddingConfig, Int8LinearConfig, int8_weights

_FLOAT32 = jnp.dtype(jnp.float32)
_STEPS = 256  # a power of two: sums of its multiples are exact


class Int8Linear(Module):
    """Computes `x @ weight.T * scale + bias`.

    Accelerators make floats of the weights as they multiply. CPUs multiply int8 numbers, which are summed in int32: each
    token of `x` is rounded to 16 bits, which are two int8 numbers, with a scale of its own. Sums of integers have no
    order, so that a result depends on its token alone, to the last bit.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (a scale for each row and each column).
    """

    Config = Int8LinearConfig

    def __init__(self, cfg: Int8LinearConfig, *, rngs: nnx.Rngs):
        drawn = cfg.init.build()(rngs.params(), (cfg.input_dim, cfg.output_dim), cfg.input_dim)
        weight, scale = quantized(drawn.T)
        axes = (cfg.output_axis, cfg.input_axis)
        # Outputs first: the inputs of an output lie together, as the products of a CPU want them.
        self.weight = parameter(_given(weight), rngs, weight.shape, axes, fan_in=cfg.input_dim)
        self.scale = parameter(_given(scale), rngs, scale.shape, axes[:1], fan_in=1)
        self.bias = parameter(constant_init(0.0), rngs, scale.shape, axes[:1], fan_in=1) if cfg.bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        halves = platform_in_use() == "cpu"
        y = _of_halves(x, self.weight[...]) if halves else _of_floats(x, self.weight[...])
        y *= _rows(self.scale[...], x.ndim)
        # A product and a sum with it would be rounded at once, or not, as the compiler likes.
        y = jax.lax.optimization_barrier(y) if halves else y
        y = y if self.bias is None else y + _rows(self.bias[...].astype(jnp.float32), x.ndim)
        return y.astype(x.dtype)


class Int8Embedding(Module):
    """Looks up a vector of int8 numbers for each id, and makes them floats by the scale of the id.

    Logits are made of floats, slowly: a model whose output is tied to it is faster with a head of its own, by `untied`.
    The vector of an id beyond the vocabulary is NaN.
    """

    Config = Int8EmbeddingConfig

    def __init__(self, cfg: Int8EmbeddingConfig, *, rngs: nnx.Rngs):
        drawn = cfg.init.build()(rngs.params(), (cfg.vocab_size, cfg.dim), cfg.dim)
        weight, scale = quantized(drawn)
        self.weight = parameter(_given(weight), rngs, weight.shape, ("vocab", "embed"), fan_in=cfg.dim)
        self.scale = parameter(_given(scale), rngs, scale.shape, ("vocab",), fan_in=1)

    def __call__(self, ids: Int[Array, "*B"], dtype: jnp.dtype = _FLOAT32) -> Float[Array, "*B D"]:
        values = jnp.take(self.weight[...], ids, axis=0).astype(jnp.float32)
        return (values * jnp.take(self.scale[...], ids, axis=0)[..., None]).astype(dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        sums = x.astype(jnp.float32) @ self.weight[...].astype(jnp.float32).T
        return (sums * _rows(self.scale[...], x.ndim)).astype(x.dtype)


def with_int8_weights(cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
    """A trained model whose linear maps and embedding are int8, but for routers and the experts of mixtures.

    Args:
        cfg: the model's config.
        params: its parameters, NumPy's or JAX's.
    """
    changed = int8_weights(cfg)
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: changed.build(rngs=nnx.Rngs(0)))))
    given, made = flatten_params(params), {}
    for path, info in infos.items():
        if info.dtype == jnp.int8:
            is_linear = info.owners[-1] == Int8LinearConfig.TYPE
            values = given[path].swapaxes(-1, -2) if is_linear else given[path]
            made[path], made[path.removesuffix("weight") + "scale"] = quantized(values)
        elif path in given:
            made[path] = given[path]
    return changed, unflatten_params(made)


def _of_floats(x: Float[Array, "*B I"], weight: Int[Array, "O I"]) -> Float[Array, "*B O"]:
    last = ((x.ndim - 1,), (1,))
    return jax.lax.dot_general(x, weight.astype(x.dtype), (last, ((), ()))).astype(jnp.float32)


def _of_halves(x: Float[Array, "*B I"], weight: Int[Array, "O I"]) -> Float[Array, "*B O"]:
    halves, scale = _split(x.astype(jnp.float32))
    last = ((halves.ndim - 1,), (1,))
    sums = jax.lax.dot_general(halves, weight, (last, ((), ())), preferred_element_type=jnp.int32)
    upper, lower = sums.astype(jnp.float32)
    return (upper * float(_STEPS) + lower) * scale[..., None]


def _split(x: Float[Array, "*B I"]) -> tuple[Int[Array, "2 *B I"], Float[Array, "*B"]]:
    """Floats as integers of 16 bits times a scale of each row; of these, the multiples of `_STEPS`, and what they leave.

    Only a product is rounded, and the rest is of integers: a compiler has no choice.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    most = float(MOST * _STEPS)
    # Of a row with NaN it is NaN, and with it all that is made of the row.
    scale = jnp.where(largest == 0, jnp.ones_like(largest), largest / most)
    rounded = jnp.round(x * (1.0 / scale)[..., None]).astype(jnp.int32)
    upper = (rounded + _STEPS // 2) // _STEPS
    return jnp.stack([upper, rounded - _STEPS * upper]).astype(jnp.int8), scale


def _rows(vector: Float[Array, " O"], ndim: int) -> Array:
    """A vector as the last dim of arrays of so many dims."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def _given(values: Array) -> Callable[..., Array]:
    return lambda key, shape, fan_in: values
