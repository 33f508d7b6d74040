"""Calls of a component's methods as its interface describes them, traced and compared with what it says."""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pippin.core.config import Config
from pippin.core.errors import ConfigError, PippinError
from pippin.core.interface import structure
from pippin.v1 import interface_pb2 as pb

# What is static in the interfaces of layers.
_STATICS = {"aligned": False, "last_only": True, "scale": 0.5}
_DTYPES = {pb.DTYPE_FLOAT32: jnp.float32, pb.DTYPE_INT32: jnp.int32, pb.DTYPE_BOOL: jnp.bool_}
_LEADING = ((), (3,), (3, 5))  # what "..." stands for


class _DiffersError(ConfigError):
    """A result that is not what the interface says."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """An input that is no array."""

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    """A state taken apart: its own classes may refuse to be made of anything but arrays."""

    leaves: list[Any]
    tree: Any = dataclasses.field(metadata={"static": True})


def _taken_apart(state: Any) -> _State:
    leaves, tree = jax.tree.flatten(state)
    return _State([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves], tree)


@dataclasses.dataclass
class TracedCalls:
    """Calls the methods of one component, and remembers the states that they return."""

    cfg: Config
    component: Callable[[Any], Any]
    params: Any
    dtype: jnp.dtype
    bound: dict[str, int]  # symbols whose size the config says
    sizes: dict[str, int]  # and that of all others, where an input has them
    values: dict[str, Any]
    states: dict[str, _State] = dataclasses.field(default_factory=dict)  # that calls have returned
    lead: tuple[int, ...] = ()  # what "..." stands for in this call

    def check(self, method: pb.Method) -> None:
        """Calls a method with and without its optional inputs."""
        has_lead = any("..." in i.dims for i in method.inputs)
        choices = list(_choices(method))
        for self.lead, chosen in itertools.product(_LEADING if has_lead else _LEADING[:1], choices):
            self._call(method, chosen, all_chosen=chosen == choices[-1])

    def _call(self, method: pb.Method, chosen: frozenset[str], *, all_chosen: bool) -> None:
        given = [i for i in method.inputs if not i.optional or i.name in chosen]
        inputs = {i.name: self._input(i, i.name, chosen) for i in given}
        shown = ", ".join(f"{name}={_brief(value)}" for name, value in inputs.items())
        where = f"{type(self.cfg).TYPE}.{method.name}({shown})"
        problems: list[ConfigError] = []  # JAX would add a note on its own frames to what leaves it

        def run(params: Any, inputs: Any) -> None:
            made = {i.name: _made(i, inputs[i.name]) for i in given}
            try:
                result = getattr(self.component(params), method.name)(**made)
                # While it is traced: afterwards, structures would be made again, of shapes instead of arrays.
                self._compare_all(where, method, result, self._bound_by(given, chosen))
            except _DiffersError as e:
                problems.append(e)
            except Exception as e:  # noqa: BLE001  whatever it is, it is reported
                if isinstance(e, PippinError) and not all_chosen:
                    return  # it says what it lacks
                problem = ConfigError(
                    f"{where} failed, though the interface {self.cfg.PROVIDES!r} has it so: {type(e).__name__}: {e}"
                )
                problem.__cause__ = e
                problems.append(problem)

        jax.eval_shape(run, self.params, inputs)
        if problems:
            raise ConfigError(str(problems[0])) from problems[0].__cause__

    def _bound_by(self, given: list[pb.Tensor], chosen: frozenset[str]) -> dict[str, Any]:
        """The sizes of the symbols, and the dtype, that a call's inputs and the config decide."""
        inside = [tensor for i in given for _, tensor in _inner(i, i.name, chosen)]
        symbols = {d for tensor in inside for d in tensor.dims if d != "..." and not d.isdecimal()}
        bound: dict[str, Any] = {**self.bound, **{symbol: self.sizes[symbol] for symbol in symbols}}
        if any(tensor.dtype in (pb.DTYPE_FLOAT, pb.DTYPE_NAME) for tensor in inside):
            bound["dtype"] = self.dtype
        return bound

    def _input(self, tensor: pb.Tensor, path: str, chosen: frozenset[str]) -> Any:
        """What a method is called with, arrays by their shape."""
        match tensor.dtype:
            case pb.DTYPE_STRUCTURE:
                fields = structure(tensor.structure).fields
                given = [f for f in fields if not f.optional or f"{path}.{f.name}" in chosen]
                return {f.name: self._input(f, f"{path}.{f.name}", chosen) for f in given}
            case pb.DTYPE_STATE:
                if tensor.name not in self.states:
                    self.states[tensor.name] = _taken_apart(self._value(tensor.name))
                return self.states[tensor.name]
            case pb.DTYPE_STATIC:
                return _Static(self._value(tensor.name))
            case pb.DTYPE_NAME:
                return _Static(self.dtype)
            case pb.DTYPE_SIZE:
                return _Static(self._size(tensor.dims[0]))
            case pb.DTYPE_SHAPE:
                return _Static(tuple(map(self._size, tensor.dims)))
            case pb.DTYPE_KEY:
                return jax.eval_shape(lambda: jax.random.key(0))
        dims = [d for d in tensor.dims if d != "..."]
        lead = self.lead if len(dims) < len(tensor.dims) else ()
        dtype = self.dtype if tensor.dtype == pb.DTYPE_FLOAT else _DTYPES[tensor.dtype]
        return jax.ShapeDtypeStruct((*lead, *map(self._size, dims)), dtype)

    def _size(self, dim: str) -> int:
        if not dim.isdecimal() and dim not in self.sizes:
            raise ConfigError(f"the size of {dim} in {self.cfg.PROVIDES!r} is not known. Give it in `sizes`.")
        return int(dim) if dim.isdecimal() else self.sizes[dim]

    def _value(self, name: str) -> Any:
        known = {**_STATICS, **self.values}
        if name not in known:
            raise ConfigError(
                f"{self.cfg.PROVIDES!r} takes {name}, which no method made. Give it in `values`."
            )
        return known[name]

    def _compare_all(self, where: str, method: pb.Method, result: Any, bound: dict[str, Any]) -> None:
        outputs = (result,) if len(method.outputs) == 1 else result
        if method.outputs and (not isinstance(outputs, tuple) or len(outputs) != len(method.outputs)):
            raise _DiffersError(
                f"{where} returned {_brief(result)}; the interface {self.cfg.PROVIDES!r} says a tuple of "
                f"{', '.join(o.name for o in method.outputs)}. Return that."
            )
        for tensor, value in zip(method.outputs, outputs if method.outputs else (), strict=True):
            self._compare(where, tensor.name, tensor, value, bound)

    def _compare(self, where: str, path: str, tensor: pb.Tensor, value: Any, bound: dict[str, Any]) -> None:
        """Raises unless a value is what the interface says; binds the symbols that it is the first to show."""

        def differs(says: str) -> _DiffersError:
            return _DiffersError(
                f"{where} returned {path}={_brief(value)}; the interface {self.cfg.PROVIDES!r} says {says}. Return "
                "that, or provide another interface."
            )

        if value is None:
            if not tensor.optional:
                raise differs("that it is never None")
        elif tensor.dtype == pb.DTYPE_STATE:
            value = _taken_apart(value)
            before = self.states.setdefault(tensor.name, value)
            if value != before:
                raise differs(f"that a state keeps its shapes and dtypes, here {_brief(before)}")
        elif tensor.dtype == pb.DTYPE_STRUCTURE:
            described = structure(tensor.structure)
            cls = _python_class(described)
            as_dict = issubclass(cls, dict)  # a TypedDict
            if not isinstance(value, dict if as_dict else cls):
                raise differs(f"a {cls.__name__}")
            bound = {symbol: size for symbol, size in bound.items() if symbol not in described.free}
            for field in described.fields:
                inside = value[field.name] if as_dict else getattr(value, field.name)
                self._compare(where, f"{path}.{field.name}", field, inside, bound)
        elif tensor.dtype != pb.DTYPE_STATIC and not self._fits(tensor, value, bound):
            raise differs(self._said(tensor, bound))

    def _fits(self, tensor: pb.Tensor, value: Any, bound: dict[str, Any]) -> bool:
        if not isinstance(value, jax.Array):
            return False
        if tensor.dtype == pb.DTYPE_FLOAT:
            if (
                not jnp.issubdtype(value.dtype, jnp.floating)
                or bound.setdefault("dtype", value.dtype) != value.dtype
            ):
                return False
        elif value.dtype != _DTYPES[tensor.dtype]:
            return False
        dims = [d for d in tensor.dims if d != "..."]
        lead = self.lead if len(dims) < len(tensor.dims) else ()
        if len(value.shape) != len(lead) + len(dims) or value.shape[: len(lead)] != lead:
            return False
        sizes = value.shape[len(lead) :]
        return all(
            size == (int(dim) if dim.isdecimal() else bound.setdefault(dim, size))
            for dim, size in zip(dims, sizes, strict=True)
        )

    def _said(self, tensor: pb.Tensor, bound: dict[str, Any]) -> str:
        """The dtype and dims of a tensor, as the interface names them and as numbers."""
        kind = (
            bound.get("dtype", "float")
            if tensor.dtype == pb.DTYPE_FLOAT
            else jnp.dtype(_DTYPES[tensor.dtype]).name
        )
        numbers = [*map(str, self.lead)] if "..." in tensor.dims else []
        numbers += [str(bound.get(d, d)) for d in tensor.dims if d != "..."]
        return f"{kind}[{', '.join(tensor.dims)}], here [{', '.join(numbers)}]"


def _python_class(described: pb.Structure) -> type:
    module, _, name = described.implementation.partition(":")
    return getattr(importlib.import_module(module), name)


def _made(tensor: pb.Tensor, value: Any) -> Any:
    """An input as the method gets it: structures as their classes."""
    if isinstance(value, _Static):
        return value.value
    if isinstance(value, _State):
        return jax.tree.unflatten(value.tree, value.leaves)
    if tensor.dtype != pb.DTYPE_STRUCTURE:
        return value
    described = structure(tensor.structure)
    left_out = {f.name: None for f in described.fields if f.dtype != pb.DTYPE_STATIC}
    fields = {f.name: _made(f, value[f.name]) for f in described.fields if f.name in value}
    return _python_class(described)(**{**left_out, **fields})


def _inner(
    tensor: pb.Tensor, path: str, chosen: frozenset[str] | None = None
) -> Iterator[tuple[str, pb.Tensor]]:
    """A tensor, and those inside it, each with its path; of optional ones, those that are chosen, or all."""
    yield path, tensor
    for field in structure(tensor.structure).fields if tensor.structure else ():
        at = f"{path}.{field.name}"
        if chosen is None or not field.optional or at in chosen:
            yield from _inner(field, at, chosen)


def _choices(method: pb.Method) -> Iterator[frozenset[str]]:
    """Sets of optional inputs by path: none, each alone with what it lies in, and all."""
    optional = [
        path
        for i in method.inputs
        for path, tensor in _inner(i, i.name)
        if tensor.optional and tensor.dtype != pb.DTYPE_STATIC
    ]
    alone = [frozenset(p for p in optional if f"{path}.".startswith(f"{p}.")) for path in optional]
    yield from dict.fromkeys([frozenset[str](), *alone, frozenset(optional)])


def _brief(value: Any) -> str:
    """A value as `float32[3, 5]`, or as short as it can be said."""
    if isinstance(value, _Static):
        return repr(value.value)
    if isinstance(value, _State):
        # The tree is shown as PyTreeDef({'k': *}), a star for each leaf.
        shown = str(value.tree).removeprefix("PyTreeDef(").removesuffix(")").split("*")
        return "".join(
            part
            for pair in itertools.zip_longest(shown, map(_brief, value.leaves), fillvalue="")
            for part in pair
        )
    if isinstance(value, jax.ShapeDtypeStruct | jax.Array):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_brief(v)}' for k, v in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_brief, value))})"
    return repr(value)
