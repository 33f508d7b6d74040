"""Whether a component does what its interface says. Methods are traced, not run, so that any size is cheap.

    check_conformance(MyFeedForwardConfig(hidden_dim=32))

A component that passes fits every slot of its interface.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pippin.core.config import REQUIRED, Config
from pippin.core.config_tree import transform
from pippin.core.errors import ConfigError
from pippin.core.interface import interface
from pippin.core.mesh_config import require_logical_axis
from pippin.core.module import flatten_params, merge, parameter_infos, split
from pippin.core.traced_call import TracedCalls
from pippin.v1 import interface_pb2 as pb

# The size of each symbol, where no field of the config says it. No two that could be mixed up are equal.
SIZES = {
    "B": 3,  # batch
    "T": 5,  # queries
    "S": 7,  # keys
    "D": 16,  # model
    "N": 4,  # heads
    "K": 2,  # key and value heads
    "H": 8,  # head
    "F": 24,  # hidden
    "E": 6,  # experts
    "k": 2,  # experts of a token
    "V": 64,  # vocabulary
    "M": 10,  # rows
    "G": 9,  # groups of rows
    "I": 12,  # inputs
    "O": 20,  # outputs
}


def fill_required(cfg: Config, values: Mapping[str, Any]) -> Config:
    """A tree whose unset fields have values by their name, but for those that their holders set."""

    def fill(c: Config) -> Config:
        settings = [s.field for s in interface(c.PROVIDES).settings] if c.PROVIDES else []
        unset = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) is REQUIRED]  # type: ignore[arg-type]
        return c.set(**{name: values[name] for name in unset if name in values and name not in settings})

    return transform(cfg, fill)


def check_conformance(
    cfg: Config,
    *,
    dtype: Any = jnp.float32,
    sizes: Mapping[str, int] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Traces all methods of what a config describes, called as its interface says.

    Methods that work on the host are only compared by their arguments' names.

    Args:
        cfg: all required fields are set but for those that the holder sets.
        dtype: of the activations.
        sizes: of the interface's symbols, instead of `SIZES`.
        values: by name, what the component is built with, and inputs that are static or states.

    Raises:
        ConfigError: the component does not do what its interface says.
    """
    described = interface(type(cfg).PROVIDES)
    for method in described.methods:
        _check_signature(cfg, method)
    if all(method.host for method in described.methods):
        return
    values, bound, free = dict(values or {}), {}, {**SIZES, **(sizes or {})}
    for setting in described.settings:
        if setting.symbol:
            if getattr(cfg, setting.field) is REQUIRED:
                cfg = cfg.set(**{setting.field: free[setting.symbol]})
            bound[setting.symbol] = getattr(cfg, setting.field)
    arguments = {name: values[name] for name in described.arguments if name in values}
    try:
        component, params = _build(cfg, arguments, with_rngs="rngs" in described.arguments)
    except TypeError as e:
        raise ConfigError(
            f"{type(cfg).TYPE} could not be built with {', '.join(described.arguments) or 'its config alone'}, as "
            f"{type(cfg).PROVIDES!r} has it: {e}. Take these arguments, or give them in `values`."
        ) from e
    checker = TracedCalls(cfg, component, params, jnp.dtype(dtype), bound, {**free, **bound}, values)
    for method in described.methods:
        if not method.host:
            checker.check(method)


def _build(cfg: Config, arguments: dict[str, Any], *, with_rngs: bool) -> tuple[Callable[[Any], Any], Any]:
    """A function from parameters to the component, and the parameters' shapes."""
    if not with_rngs:
        built = cfg.build(**arguments)
        return lambda params: built, {}
    module = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0), **arguments))
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"{type(cfg).TYPE} builds a {type(module).__name__}, which cannot have parameters. Derive it from "
            "pippin.core.module.Module."
        )
    for path, info in flatten_params(parameter_infos(module)).items():
        if len(info.axes) != len(info.shape):
            raise ConfigError(
                f"{type(cfg).TYPE}: the parameter {path} of shape {info.shape} has the logical axes {info.axes}. "
                "Give it one for each dim."
            )
        for axis in info.axes:
            if axis is not None:
                require_logical_axis(axis)
    definition, params = split(module)
    return lambda params: merge(definition, params), params


def _check_signature(cfg: Config, method: pb.Method) -> None:
    """Raises unless a class has a method that takes the inputs in their order and by their names."""
    cls = cfg.implementation()
    names = [i.name for i in method.inputs]
    where = (
        f"{type(cfg).TYPE} provides {type(cfg).PROVIDES!r}, whose method is {method.name}({', '.join(names)})"
    )
    found = next((c.__dict__[method.name] for c in cls.__mro__ if method.name in c.__dict__), None)
    if found is None:
        raise ConfigError(
            f"{where}: {cls.__name__} has no such method. Add it, or provide another interface."
        )
    parameters = list(inspect.signature(found).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = [p.name for p in plain if p.kind is not p.KEYWORD_ONLY and p.name in names]
    optional = {i.name for i in method.inputs if i.optional}
    problems = [f"takes no {n}" for n in names if n not in {p.name for p in plain}]
    problems += [f"needs {p.name}" for p in plain if p.name not in names and p.default is p.empty]
    problems += [
        f"does not work without {p.name}" for p in plain if p.name in optional and p.default is p.empty
    ]
    if positional != [n for n in names if n in positional]:
        problems.append(f"takes them in the order {', '.join(positional)}")
    if problems:
        raise ConfigError(
            f"{where}: that of {cls.__name__} {' and '.join(problems)}. Give it these arguments."
        )
