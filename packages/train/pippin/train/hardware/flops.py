"""Floating-point operations of a function, counted in its jaxpr: matmuls alone, loops as often as they turn."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """The operations (a multiplication and an addition each count) of all matmuls.

    A loop whose number of turns is not known counts as one turn; of a conditional's branches, the dearest counts.
    """
    total = 0.0
    eqn: Any
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "ragged_dot_general" or name == "ragged_dot":
            rows, inner = eqn.invars[0].aval.shape[-2:]
            total += 2.0 * rows * inner * eqn.outvars[0].aval.shape[-1]
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in params["branches"])
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += float(estimate.flops) if estimate else 0.0
        else:
            turns = params["length"] if name == "scan" else 1
            total += turns * sum(matmul_flops(inner) for inner in _inner(params))
    return total


def function_flops(function: Any, *arguments: Any) -> float:
    """Those of a call, which is traced and not run."""
    return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)


def _inner(params: Any) -> list[core.Jaxpr]:
    """The jaxprs that a primitive runs."""
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_thunk", "cond_jaxpr"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # a closed one holds a jaxpr, and its constants
            if isinstance(jaxpr, core.Jaxpr):
                found.append(jaxpr)
    return found
