"""Configs of key-value caches."""

from pippin.core.config import REQUIRED, Config, Required


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
