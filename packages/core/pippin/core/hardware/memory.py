"""What arrays take of a device's memory."""

import math
from typing import Any

import jax


def shard_bytes(tree: Any) -> float:
    """What one device holds of arrays, or of shapes with shardings."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    )
