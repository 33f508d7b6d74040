"""Compiled programs that are kept: a second start of the same job does not compile again."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from pippin.core.cache_dir import default_cache_dir

_MOST_BYTES = 10 * 2**30  # hundreds of large steps' programs, of some tens of MB each
_OWN_MOST = "JAX_COMPILATION_CACHE_MAX_SIZE"


def keep_compiled_programs(directory: Path | None = None, *, least_s: float | None = None) -> Path:
    """Has JAX keep what it compiles, and use what was kept. An own choice (JAX_COMPILATION_CACHE_DIR) stands.

    Of all programs together at most 10 GiB are kept: those not used for longest go first. An own limit (JAX_COMPILATION_CACHE_MAX_SIZE: bytes, or -1 for none) stands. A damaged one is
    compiled again each time.

    JAX's key covers the program, the compiler's version and its options, and the devices. It does not cover which
    instructions this machine's CPU has, on which programs for the CPU depend: they are a part of the directory.

    Args:
        directory: where they are kept.
        least_s: programs that compile in less time are not kept; None: JAX's own choice, a second.

    Returns:
        The directory.
    """
    if least_s is not None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_s)
    if own := jax.config.jax_compilation_cache_dir:
        return Path(own)
    chosen = directory or default_cache_dir() / "programs" / _cpu()
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    # JAX keeps to a limit with filelock, which tokenizers brings: without it, it would keep nothing.
    if _OWN_MOST not in os.environ and importlib.util.find_spec("filelock") is not None:
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    compilation_cache.reset_cache()  # else a process that has compiled already would not use it
    return chosen


def _cpu() -> str:
    """16 hex digits for the kind of CPU and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()[:16]
