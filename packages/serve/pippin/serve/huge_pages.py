"""Memory that a CPU finds by few steps: reading a model's weights takes as long as finding where they lie.

A page of 2 MiB has one entry in the tables by which a processor finds memory, in place of 512. Linux gives them to who
asks ("madvise", as most distributions set it); nothing else changes.
"""

import ctypes
import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax

SIZE = 2 << 20  # bytes of a huge page, on x86 and mostly on ARM
_MADV_HUGEPAGE, _MADV_COLLAPSE = (
    14,
    25,
)  # of linux/mman.h; the second came with Linux 6.1, and does it at once


class Region(NamedTuple):
    """A piece of this process's memory, of whole huge pages."""

    begin: int
    size: int


def regions(arrays: Iterable[jax.Array]) -> list[Region]:
    """Where arrays on CPUs lie, without the ends that fill no huge page, and those that are smaller than one."""
    found = []
    for part in (shard.data for array in arrays for shard in array.addressable_shards):
        if part.device.platform == "cpu":
            begin = part.unsafe_buffer_pointer()
            first, last = -(-begin // SIZE) * SIZE, (begin + part.nbytes) // SIZE * SIZE
            if first < last:
                found.append(Region(first, last - first))
    return found


def use_huge_pages(memory: Iterable[Region]) -> int:
    """Asks Linux to hold memory in huge pages; returns of how many bytes it took the advice.

    Nothing in it changes or moves, and where the system refuses, all stays as it is. It may have been freed meanwhile.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    taken = 0
    for begin, size in memory:
        # The second does now what the first leaves to the system's time.
        advised = [madvise(begin, size, advice) for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE)]
        taken += size if 0 in advised else 0
    return taken
