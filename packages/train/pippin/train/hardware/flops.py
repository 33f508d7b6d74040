"""Floating-point operations of a function, counted in its jaxpr: matmuls alone, loops as often as they turn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.extend import core

# How many matmuls of queries with keys, or as large, cuDNN's attention does: the backward pass computes logits again.
_CUDNN_MATMULS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


class Flops(NamedTuple):
    """Operations of matmuls: a multiplication and an addition each count."""

    compiled: float = 0.0  # of those that XLA compiles
    kernels: float = 0.0  # of those inside kernels of Pallas or cuDNN, as if no block of theirs were skipped

    @property
    def total(self) -> float:
        """All of them."""
        return self.compiled + self.kernels


def matmul_flops(jaxpr: core.Jaxpr) -> Flops:
    """The operations of all matmuls, on all devices together.

    A loop whose number of turns is not known counts as one turn; of a conditional's branches, the dearest counts.
    """
    compiled = kernels = 0.0
    eqn: Any
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            compiled += _dot(eqn)
        elif name in ("ragged_dot_general", "ragged_dot"):
            rows, inner = eqn.invars[0].aval.shape[-2:]
            compiled += 2.0 * rows * inner * eqn.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            counted = math.prod(params["grid_mapping"].grid) * matmul_flops(params["jaxpr"]).total
            told = params["cost_estimate"]  # by a kernel with loops whose turns are not known here
            kernels += max(counted, 0.0 if told is None else told.flops)
        elif name in _CUDNN_MATMULS:
            kernels += _CUDNN_MATMULS[name] * _cudnn_matmul(eqn)
        else:
            times, parts = _parts(name, params)
            compiled += times * sum(p.compiled for p in parts)
            kernels += times * sum(p.kernels for p in parts)
    return Flops(compiled, kernels)


def function_flops(function: Any, *arguments: Any) -> Flops:
    """Those of a call, which is traced and not run."""
    return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _parts(name: str, params: Any) -> tuple[int, list[Flops]]:
    """How often a primitive runs what it holds, and the operations of that."""
    if name == "cond":
        return 1, [max((matmul_flops(branch.jaxpr) for branch in params["branches"]), key=lambda f: f.total)]
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        # What is inside runs once for each part over its own axes; over others, it is still of the whole.
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times, [matmul_flops(inner) for inner in _inner(params)]


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)


def _cudnn_matmul(eqn: Any) -> float:
    batch, queries, heads, head_dim = eqn.invars[0].aval.shape
    return 2.0 * batch * heads * queries * eqn.invars[1].aval.shape[1] * head_dim


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
