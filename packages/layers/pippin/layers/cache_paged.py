"""A cache of keys and values in pages: rows of any length share one array, and no memory is kept for what may come."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pippin.core.module import Module
from pippin.core.sharding import constrain
from pippin.layers.cache_config import PagedCacheConfig
from pippin.layers.context import Cache, PagedKeyValues
from pippin.layers.int8 import quantized


class PagedState(NamedTuple):
    """The arrays of a cache."""

    # The keys of head i at 2 i, and the values at 2 i + 1: the TPU's kernel reads them so, in one transfer.
    pages: Num[Array, "*layers pages page_size two_K H"]
    tables: Int[Array, "*layers B P"]  # entry i: the page of a row's positions from i * page_size on
    # What a page's int8 numbers are worth, of each token and head; None: pages hold floats.
    scales: Float[Array, "*layers pages page_size two_K"] | None = None


class PagedCache(Module):
    """Keeps the key of position p of a row in slot p mod page_size of the page that the row's table names.

    Whoever has the cache says whose pages are whose, by `assign_pages`; where the config has no number of pages, each
    row has its own from the start. Nothing is kept for entries that name no page, such as -1.

    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.1 (PagedAttention).
    """

    Config = PagedCacheConfig

    def __init__(self, cfg: PagedCacheConfig):
        self.cfg = cfg

    def init(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> PagedState:
        """An empty cache for positions below `max_len`."""
        per_row = -(-max_len // self.cfg.page_size)
        if self.cfg.num_pages is None:
            count = batch_size * per_row
            tables = jnp.arange(count, dtype=jnp.int32).reshape(batch_size, per_row)
        else:
            count, tables = self.cfg.num_pages, jnp.full((batch_size, per_row), -1, jnp.int32)
        shape = (count, self.cfg.page_size, 2 * self.cfg.num_kv_heads, self.cfg.head_dim)
        if self.cfg.int8:
            return PagedState(jnp.zeros(shape, jnp.int8), tables, jnp.zeros(shape[:-1], jnp.float32))
        return PagedState(jnp.zeros(shape, dtype), tables)

    def extend(
        self,
        state: PagedState,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple[PagedState, PagedKeyValues]:
        """The cache with new tokens, and all that the new queries may attend to.

        The positions of a row follow each other, padding (-1) aside. Tokens at negative positions, and those whose
        row has no page for them, are not kept.
        """
        count, size, *rest = state.pages.shape
        index = positions // size
        found = jnp.take_along_axis(state.tables, jnp.clip(index, 0, state.tables.shape[1] - 1), axis=1)
        kept = (index >= 0) & (index < state.tables.shape[1]) & (found >= 0)
        new = jnp.stack([k, v], axis=3).reshape(*positions.shape, *rest)
        # A page beyond the last is none: "drop" drops what is for it.
        slots = jnp.where(kept, found, count), positions % size
        scales = state.scales
        if scales is not None:
            new, of_new = quantized(new)
            scales = scales.at[slots].set(of_new, mode="drop")
            scales = constrain(scales, None, None, "kv_heads")
        pages = state.pages.at[slots].set(new.astype(state.pages.dtype), mode="drop")
        pages = constrain(pages, None, None, "kv_heads", None)
        kv = PagedKeyValues(
            k, v, positions, None, aligned=False, pages=pages, tables=state.tables, scales=scales
        )
        return state._replace(pages=pages, scales=scales), kv


def assign_pages(cache: Cache, tables: Int[Array, "B P"]) -> Cache:
    """A cache whose layers all have these tables: the pages of each row, -1 where it has none yet."""

    def assign(state: PagedState) -> PagedState:
        lead = state.tables.shape[:-2]  # of stacked layers
        return state._replace(tables=jnp.broadcast_to(tables, (*lead, *tables.shape)))

    def is_state(node: Cache) -> bool:
        return isinstance(node, PagedState)

    return jax.tree.map(lambda node: assign(node) if is_state(node) else node, cache, is_leaf=is_state)


def map_cache(place: Callable[[Any, tuple[str | None, ...]], Any], cache: Cache) -> Any:
    """What `place` makes of each array of a cache and of the logical axes of its dims, in a tree of the cache's form."""

    def of_node(node: Any) -> Any:
        if not isinstance(node, PagedState):
            return place(node, (None,) * node.ndim)
        lead = (None,) * (node.pages.ndim - 4)  # of stacked layers
        pages = place(node.pages, (*lead, None, None, "kv_heads", None))
        tables = place(node.tables, (None,) * node.tables.ndim)
        scales = None if node.scales is None else place(node.scales, (*lead, None, None, "kv_heads"))
        return PagedState(pages, tables, scales)

    return jax.tree.map(of_node, cache, is_leaf=lambda node: isinstance(node, PagedState))
