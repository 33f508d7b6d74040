"""Configs of key-value caches."""

from pippin.core.config import REQUIRED, Config, Required
from pippin.core.errors import ConfigError


class FullCacheConfig(Config, implementation="pippin.layers.cache:FullCache", provides="kv_cache"):
    """Keeps every key and value up to a length. The holder sets the dims."""

    num_kv_heads: Required[int] = REQUIRED
    head_dim: Required[int] = REQUIRED
    window: int | None = None


class SlidingWindowCacheConfig(
    Config, implementation="pippin.layers.cache:SlidingWindowCache", provides="kv_cache"
):
    """Keeps the last `window` keys and values; all, where the window is None. The holder sets the dims and the window."""

    num_kv_heads: Required[int] = REQUIRED
    head_dim: Required[int] = REQUIRED
    window: int | None = None


class PagedCacheConfig(Config, implementation="pippin.layers.cache_paged:PagedCache", provides="kv_cache"):
    """Keys and values in pages that rows share: whose pages are whose is up to the caller. The holder sets the dims."""

    num_kv_heads: Required[int] = REQUIRED
    head_dim: Required[int] = REQUIRED
    window: int | None = None
    page_size: int = 16  # tokens
    num_pages: int | None = (
        None  # None: as many as all rows can fill, and each row has its own from the start
    )
    int8: bool = False  # keys and values are rounded, with a scale for each token and head

    def validate(self) -> None:
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ConfigError(f"PagedCache: page_size ({self.page_size}) must be a power of two, such as 16.")
        if self.num_pages is not None and self.num_pages < 1:
            raise ConfigError(f"PagedCache: num_pages ({self.num_pages}) must be at least 1.")
