"""Work in a process of its own, whose memory goes back when it is done, and whose peak is nobody else's."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def in_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """What a function of a module returns; an exception of its is raised here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)
