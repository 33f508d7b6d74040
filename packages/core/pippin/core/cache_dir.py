"""Where pippin keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """PIPPIN_CACHE_DIR, or else `pippin` in the user's cache directory (XDG_CACHE_HOME)."""
    if own := os.environ.get("PIPPIN_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pippin"
