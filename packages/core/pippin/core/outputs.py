"""What components report beside their result: auxiliary losses and metrics.

A component deep in a model calls `add_loss` or `add_metric`; whoever runs the
model opens `collect()` around the call. No signature in between changes, which
is why an MoE with a balance loss fits every slot that a plain feed-forward fits.

JAX transformations must not leak tracers through this side door: code that
runs children inside `scan`, `vmap` or `checkpoint` collects inside the
transformed function, returns the outputs from it, and adds them outside, as
`pippin.layers.stack` does.

Source: the invocation context of AXLearn, arXiv:2507.05411, section 4.3.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pippin.core.errors import PippinError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Outputs:
    """Scalars by name, of float32 or wider. Losses of one name add up; metrics of one name are averaged."""

    # Any: JAX takes the tree apart, and puts it together again of what stands for arrays.
    losses: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: dict[str, Any] = dataclasses.field(default_factory=dict)  # metric -> sum of its reports
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)  # metric -> number of its reports

    def total_loss(self) -> Array:
        """The sum of all losses; zero if there are none."""
        return functools.reduce(jnp.add, self.losses.values()) if self.losses else jnp.zeros((), jnp.float32)

    def means(self) -> dict[str, Array]:
        """Each metric's mean over its reports, and each loss."""
        return {**{name: total / self.counts[name] for name, total in self.sums.items()}, **self.losses}


_current: contextvars.ContextVar[Outputs | None] = contextvars.ContextVar("outputs", default=None)


@contextlib.contextmanager
def collect() -> Iterator[Outputs]:
    """Collects what is reported inside the block. Blocks nest; the innermost one gets it."""
    outputs = Outputs()
    token = _current.set(outputs)
    try:
        yield outputs
    finally:
        _current.reset(token)


def add_loss(name: str, value: Array) -> None:
    """Adds a scalar, already weighted, to the training loss.

    Raises:
        PippinError: the value is no scalar.
    """
    _add("losses", name, _scalar("add_loss", name, value))


def add_metric(name: str, value: Array) -> None:
    """Reports a scalar for the log.

    Raises:
        PippinError: the value is no scalar.
    """
    scalar = _scalar("add_metric", name, value)
    _add("sums", name, scalar)
    _add("counts", name, jnp.ones_like(scalar))


def add_collected(inner: Outputs) -> None:
    """Reports again what was collected and returned by a transformed function, such as `checkpoint`."""
    for kind in ("losses", "sums", "counts"):
        for name, value in getattr(inner, kind).items():
            _add(kind, name, value)


def add_stacked(inner: Outputs) -> None:
    """Reports again what the runs of a `scan` or `vmap` collected and returned, stacked on axis 0."""
    add_collected(jax.tree.map(lambda values: values.sum(axis=0), inner))


def _scalar(function: str, name: str, value: Array) -> Array:
    if value.shape:
        raise PippinError(
            f"{function}({name!r}) got an array of shape {value.shape}: a report is one number. Reduce it first, "
            "with jnp.mean or jnp.sum."
        )
    # Sums of many small numbers lose them all in bfloat16.
    return value if value.dtype == jnp.float64 else value.astype(jnp.float32)


def _add(kind: str, name: str, value: Any) -> None:
    outputs = _current.get()
    if outputs is not None:
        values = getattr(outputs, kind)
        values[name] = values[name] + value if name in values else value
