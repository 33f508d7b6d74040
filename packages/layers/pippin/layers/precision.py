"""The precision of arithmetic that bfloat16 is too coarse for."""

import jax.numpy as jnp


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or the dtype itself where that is wider: what sums, softmaxes and angles are computed in."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)
