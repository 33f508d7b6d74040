"""What a layer is told about its tokens, and what it gives back: the same for every layer."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Num

# A cache is a pytree that only the component that made it looks into.
Cache = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values that queries may attend to, and where each stands."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]  # -1 where there is no key
    segment_ids: Int[Array, "B S"] | None
    # Key i is of the token of query i: no query attends to a key that lies behind it.
    aligned: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKeyValues(KeyValues):
    """The keys and values of new tokens, and the pages that hold these and all before them.

    A query sees the keys of its row up to its own position. Several rows may have the same pages: a text that two
    requests begin with, or the parts of one long request. What a page holds behind its row's last token is not looked at.
    """

    pages: Num[Array, "pages page_size two_K H"]  # the keys of head i at 2 i, and the values at 2 i + 1
    tables: Int[Array, "B P"]  # entry i: the page of a row's positions from i * page_size on
    # What a page's int8 numbers are worth, of each token and head; None: pages hold floats.
    scales: Float[Array, "pages page_size two_K"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Where the tokens stand, and what they may attend to beside themselves."""

    # In their document, one after the other; -1 for padding.
    positions: Int[Array, "B T"]
    # Tokens attend within their segment; None: one segment a row.
    segment_ids: Int[Array, "B T"] | None = None
    # The keys and values of an earlier layer, for layers that have none of their own.
    kv: KeyValues | None = None
    # The caller reads the last position only: a layer may leave out the others where no cache needs
    # them, and return [B, 1, D].
    last_only: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """The result of a layer or of a stack of layers."""

    x: Float[Array, "B T D"]  # or the last position alone, where the context allows it
    cache: Cache  # None where none was passed in
    kv: KeyValues | None = None  # what later layers may attend to
