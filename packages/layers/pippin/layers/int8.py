"""Floats as int8 numbers with a scale for each row."""

from typing import Any

import jax.numpy as jnp
import numpy as np

MOST = 127  # of int8, both ways


def quantized(values: Any) -> tuple[Any, Any]:
    """Floats as int8 times a float32 scale of each row, NumPy's or JAX's: rounded to steps of the largest over 127."""
    on_host = isinstance(values, np.ndarray)
    xp = np if on_host else jnp
    values = values.astype(xp.float32)
    largest = xp.max(xp.abs(values), axis=-1)
    # Of a row with NaN the scale is NaN, and with it all that is made of the row.
    scale = xp.where(largest == 0, xp.ones_like(largest), largest / MOST)
    with np.errstate(invalid="ignore"):
        return xp.round(values / scale[..., None]).astype(xp.int8), scale
