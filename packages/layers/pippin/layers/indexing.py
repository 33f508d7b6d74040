"""Items of trees of arrays that are stacked on their first dim."""

from typing import Any

import jax


def item(tree: Any, i: Any) -> Any:
    """Item i of every array; i may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def with_item(tree: Any, i: Any, value: Any) -> Any:
    """The arrays with another item i."""
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), tree, value)
