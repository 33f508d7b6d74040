"""Integrates every feature everywhere, and measures what that changed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

# The features' existing modules, loaded before the first snapshot so that a change to them is seen.
import pippin.layers.moe
import pippin.layers.position  # noqa: F401
from tests.complexity import lines
from tests.complexity.runs import build_abstract
from tests.complexity.variants import diagonal, grid, random_models

if TYPE_CHECKING:
    from tests.complexity.features import Feature

MAX_MODIFIER_LINES = 10
SEED = 0  # of the random compositions
_THREADS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is tried. Every feature is composed into all 200 of the grid at any scale."""

    builds: int = 200  # of the grid, traced with their loss
    runs: int = 20  # of the diagonal, computed for real
    counts: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # N: random compositions
    random_builds: int = 25  # of the largest N, traced with their loss


QUICK = Scale(builds=10, runs=2, counts=(1, 10, 100), random_builds=2)


@dataclasses.dataclass(frozen=True)
class Change:
    """What is other than in the first snapshot. Empty is the target."""

    lines: dict[str, int]  # file -> lines added and removed
    functions: list[str]

    @property
    def total(self) -> int:
        """The lines changed in existing modules."""
        return sum(self.lines.values())


@dataclasses.dataclass(frozen=True)
class Point:
    """One modifier applied to N random compositions in one go."""

    count: int
    replaced: int  # components
    changed_lines: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class FeatureResult:
    """What the integration of one feature took."""

    name: str
    from_user: bool
    modifier: list[str]  # the lines that a user writes
    own_lines: int  # of the feature's classes; the paper leaves them out, and so do we
    composed: int  # configs of the grid that have it, and in which nothing else changed
    replaced: int  # components in those
    built: int
    ran: int
    change: Change
    mentions: dict[str, int]  # file -> lines that name it
    holders: list[str]
    new_axes: list[str]
    sweep: list[Point]
    random_built: int
    seconds: float

    @property
    def meets_target(self) -> bool:
        """No line and no function changed, at any N, by a modifier of 10 lines or fewer; a user's is named nowhere."""
        unknown = not (self.mentions or self.holders) or not self.from_user
        flat = all(point.changed_lines == 0 for point in self.sweep)
        same = self.change.total == 0 and not self.change.functions
        return same and flat and unknown and len(self.modifier) <= MAX_MODIFIER_LINES


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that the report shows."""

    files: int  # existing modules
    lines: int  # in them
    functions: int  # names watched in those that were loaded
    features: list[FeatureResult]
    seconds: float


class _Watch:
    """The existing modules as they were, on disk and in this process."""

    def __init__(self) -> None:
        self.sources, self.functions = lines.read_sources(), lines.loaded_functions()

    def change(self) -> Change:
        return Change(
            lines.changed_lines(self.sources, lines.read_sources()),
            lines.changed_functions(self.functions, lines.loaded_functions()),
        )


def measure(scale: Scale, say: Callable[[str], None]) -> Results:
    """Integrates each feature at this scale.

    Raises:
        FeatureError: a config does not compose, or does not have the feature.
    """
    started = time.perf_counter()
    models = grid()
    assert len(set(models.values())) == len(models), "two variants of the grid are the same config"
    for pair in diagonal():
        build_abstract(models[pair])
    watch = _Watch()
    # Only now: what importing a feature changes in existing modules counts too.
    features: Sequence[Feature] = importlib.import_module("tests.complexity.features").FEATURES
    results = [_measure_feature(feature, scale, watch, say) for feature in features]
    return Results(
        files=len(watch.sources),
        lines=sum(len(text.splitlines()) for text in watch.sources.values()),
        functions=len(watch.functions),
        features=results,
        seconds=time.perf_counter() - started,
    )


def _measure_feature(
    feature: Feature, scale: Scale, watch: _Watch, say: Callable[[str], None]
) -> FeatureResult:
    from tests.complexity.features import integrate, new_axes

    started = time.perf_counter()
    models = grid()
    integrated = {pair: integrate(feature, cfg) for pair, cfg in models.items()}
    say(f"{feature.name}: composed into {len(integrated)} configs")
    built = _spread([cfg for cfg, _ in integrated.values()], scale.builds)
    for cfg in built:
        build_abstract(cfg)
    say(f"{feature.name}: {len(built)} built")
    ran = _spread(diagonal(), scale.runs)
    # In threads: most of the time goes into compiling, which leaves Python alone.
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda pair: feature.acts(feature, models[pair], integrated[pair][0]), ran))
    say(f"{feature.name}: {len(ran)} run, and it acts in each")
    sweep, random_built = _sweep(feature, scale, watch)
    say(f"{feature.name}: composed into {sweep[-1].count} random configs, {random_built} of them built")
    component = feature.adds.implementation()
    return FeatureResult(
        name=feature.name,
        from_user=feature.from_user,
        modifier=lines.modifier_lines(feature.modifier),
        own_lines=_own_lines(component),
        composed=len(integrated),
        replaced=sum(count for _, count in integrated.values()),
        built=len(built),
        ran=len(ran),
        change=watch.change(),
        mentions=lines.mentions(component, watch.sources),
        holders=lines.holders(component) if feature.from_user else [],
        new_axes=sorted(new_axes(feature, models["base", "multi_head"])),
        sweep=sweep,
        random_built=random_built,
        seconds=time.perf_counter() - started,
    )


def _sweep(feature: Feature, scale: Scale, watch: _Watch) -> tuple[list[Point], int]:
    from tests.complexity.features import integrate

    models = random_models(max(scale.counts), SEED)
    replaced = [integrate(feature, cfg)[1] for cfg in models]  # checks each
    points = []
    for count in scale.counts:
        started = time.perf_counter()
        integrated = [feature.modifier(cfg) for cfg in models[:count]]
        seconds = time.perf_counter() - started
        assert len(integrated) == count
        points.append(Point(count, sum(replaced[:count]), watch.change().total, seconds))
    sample = _spread(models, scale.random_builds)
    for cfg in sample:
        build_abstract(feature.modifier(cfg))
    return points, len(sample)


def _spread[T](items: list[T], count: int) -> list[T]:
    """`count` of the items, at even distances; all where they are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _own_lines(component: type) -> int:
    classes = {component, component.Config}  # type: ignore[attr-defined]
    nested = component.Config.__qualname__.startswith(component.__qualname__ + ".")  # type: ignore[attr-defined]
    return sum(len(lines.code_lines(inspect.getsource(c))) for c in ([component] if nested else classes))
