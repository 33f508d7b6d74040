"""Which way to store each weight, of those that fit together into some bytes at the least loss."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from pippin.core.errors import ConfigError
from pippin.export.compress.sensitivity import Option


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """For each weight the option chosen: together no larger than the budget, at a loss that is the least or near it.

    From the smallest options it goes by the steps that save most loss for a byte, among the options that no mixture of two
    others beats; then it fills what is left with whatever still fits. The loss is the least for the bytes used by the
    first part, and the second leaves less than one step unused.

    Args:
        options: of each weight, at least one.
        budget: bytes.

    Raises:
        ConfigError: not even the smallest options fit.
    """
    chosen = {name: min(of, key=lambda o: o.nbytes) for name, of in options.items()}
    used = sum(option.nbytes for option in chosen.values())
    if used > budget:
        raise ConfigError(
            f"at their smallest the linear maps take {used:,} bytes, and the average asked for allows {budget:,}. Ask for "
            f"{used / budget:.3f} times the bits per weight, or allow fewer bits as a choice."
        )
    steps = {name: _hull(of)[1:] for name, of in options.items()}
    queue = [(-_gain(chosen[name], of[0]), name) for name, of in steps.items() if of]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        step = steps[name].pop(0)
        if used + step.nbytes - chosen[name].nbytes > budget:
            continue  # nor do its next ones, which are larger
        used += step.nbytes - chosen[name].nbytes
        chosen[name] = step
        if steps[name]:
            heapq.heappush(queue, (-_gain(step, steps[name][0]), name))
    return _filled(options, chosen, budget - used)


def _gain(old: Option, new: Option) -> float:
    """How much loss each byte more saves."""
    return (old.loss - new.loss) / (new.nbytes - old.nbytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that no mixture of two others beats, by size: each step saves less for a byte than that before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _filled(
    options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int
) -> dict[str, Option]:
    """The same with larger options where they fit into the bytes left, those that save most first."""
    while True:
        fits = [
            (chosen[name].loss - option.loss, name, option)
            for name, of in options.items()
            for option in of
            if option.loss < chosen[name].loss and 0 < option.nbytes - chosen[name].nbytes <= left
        ]
        if not fits:
            return chosen
        _, name, option = max(fits, key=lambda f: (f[0], f[1], f[2].bits))
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
