"""Linear maps whose matrix products are of 8-bit numbers, in training too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jaxtyping import Array, Float

from pippin.layers.linear import Linear
from pippin.layers.linear_config import MatmulType, QuantizedLinearConfig

# Of values, and of gradients, whose range is larger.
_TYPES = {
    MatmulType.INT8: (jnp.int8, jnp.int8),
    MatmulType.FP8: (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


class QuantizedLinear(Linear):
    """Computes `x @ weight + bias` of 8-bit numbers: each token and each output has a scale of its own.

    The parameters are those of `Linear`, in float32. In the backward pass, the product that makes the gradient of `x` is
    of 8-bit numbers as well; that of the weight, a sum over all tokens, is in the dtype of `x`.

    Source: Wortsman et al. 2023, arXiv:2304.13013, section 2 (which of the three products to quantise); Micikevicius et
    al. 2022, arXiv:2209.05433, section 3 (E4M3 for values, E5M2 for gradients).
    """

    Config = QuantizedLinearConfig

    def __init__(self, cfg: QuantizedLinearConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.matmul = cfg.matmul

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = quantized_product(self.matmul, x, self.weight[...])
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(
    matmul: MatmulType, x: Float[Array, "*B I"], weight: Float[Array, "I O"]
) -> Float[Array, "*B O"]:
    """`x @ weight` of 8-bit numbers, in the dtype of `x`."""
    values, _ = _TYPES[matmul]
    return _product(x, weight, values, values)


def _forward(matmul: MatmulType, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return quantized_product(matmul, x, weight), (x, weight)


def _backward(matmul: MatmulType, saved: tuple[Array, Array], of_y: Array) -> tuple[Array, Array]:
    x, weight = saved
    values, gradients = _TYPES[matmul]
    of_x = _product(of_y, weight.T, gradients, values)
    rows = tuple(range(x.ndim - 1))
    of_weight = jax.lax.dot_general(x, of_y, ((rows, rows), ((), ())), preferred_element_type=weight.dtype)
    return of_x, of_weight


quantized_product.defvjp(_forward, _backward)


def _product(a: Float[Array, "*B K"], b: Float[Array, "K N"], of_a: Any, of_b: Any) -> Float[Array, "*B N"]:
    """`a @ b`, of `a` with a scale for each row and `b` with one for each column."""
    rows = tuple(range(a.ndim - 1))
    # The library promotes dtypes and ranks, which our settings would refuse.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return qwix.dot_general(
            qwix.quantize(a, of_a, channelwise_axes=rows),
            qwix.quantize(b.astype(a.dtype), of_b, channelwise_axes=(1,)),
            (((a.ndim - 1,), (0,)), ((), ())),
        ).astype(a.dtype)
