"""A function of a Core AI program while it is written, and the rules by which components are written.

Import it late: see `coreai_tools`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pippin.core.config import Config
from pippin.export.coreai_tools import Function, Value, ops
from pippin.export.coreai_weights import Weights
from pippin.export.lowering_rules import Rules
from pippin.export.program_sizes import STATES

_RULES = Rules("for Core AI")
rule, require_rules = _RULES.rule, _RULES.require


class Emitter:
    """What rules write one function with.

    Values of tokens are [T, D], queries and keys [heads, T, H], and caches [kv_heads, S, H]: T tokens of a call, S slots
    of the context.
    """

    def __init__(
        self,
        weights: Weights,
        function: Function,
        *,
        tokens: int,
        context: int,
        dtype: type,
        adapter_slots: Mapping[str, tuple[int, tuple[int, ...]]],
    ):
        """
        Args:
            weights: of the model, for all functions.
            function: that is written; its body is open.
            tokens: of a call.
            context: slots of the caches.
            dtype: that is computed in, np.float16 or np.float32.
            adapter_slots: name of a matrix -> where it lies in the input `adapter`, and its shape.
        """
        self.weights, self.tokens, self.context, self.dtype = weights, tokens, context, dtype
        self._function, self._adapter_slots = function, adapter_slots
        self._made: dict[str, Any] = {}
        self._old_caches = {name: function.read(name) for name in STATES}
        self._new_caches: dict[str, list[Value]] = {name: [] for name in STATES}
        self.key_values: tuple[Value, Value] | None = None  # of the last layer that made some

    def emit(self, cfg: Config, path: str, *args: Any) -> Any:
        """Writes a component. `path` is that of its parameters."""
        return _RULES[type(cfg)](self, cfg, path, *args)

    def weight(self, name: str) -> Value:
        """A weight in the type that is computed in."""
        return self.once(name, lambda: self.computed(self.weights.dense(name)))

    def constant(self, name: str, values: np.ndarray) -> Value:
        """Numbers that are no weights, under a name that says what they are."""
        return self.once(
            f"constants.{name}", lambda: self.weights.constant(f"constants.{name}.{values.dtype}", values)
        )

    def number(self, value: float) -> Value:
        """A number in the type that is computed in."""
        return self.constant(f"number_{value!r}", np.array(value, self.dtype))

    def computed(self, x: Value) -> Value:
        """The same values in the type that is computed in."""
        return x if self.dtype is np.float16 else ops.cast(x, self.dtype)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What layers have in common, made by the first of them that asks for it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def low_rank(self, path: str, x: Value) -> Value | None:
        """What the adapter adds to the linear map at a path; None where it has no room for it."""
        down, up = (self._adapter_slots.get(f"{path}.{end}") for end in ("down", "up"))
        if down is None or up is None:
            return None
        return ops.batch_matmul(ops.batch_matmul(x, self._of_adapter(*down)), self._of_adapter(*up))

    def _of_adapter(self, offset: int, shape: tuple[int, ...]) -> Value:
        flat = self.once("adapter", lambda: self.computed(self._function.inputs["adapter"]))
        return reshaped(sliced(flat, [offset], [offset + math.prod(shape)]), shape)

    @functools.cached_property
    def ids(self) -> Value:
        """The tokens' ids, as indices of rows: int32 [T, 1]."""
        return reshaped(self._function.inputs["inputIds"], [self.tokens, 1])

    @functools.cached_property
    def positions(self) -> Value:
        """Where the tokens stand: int32 [T]."""
        steps = self.constant(f"tokens_{self.tokens}", np.arange(self.tokens, dtype=np.int32))
        return ops.broadcasting_add(steps, self._function.inputs["position"])

    @functools.cached_property
    def slots(self) -> Value:
        """The positions of the caches' slots: int32 [S]."""
        return self.constant(f"slots_{self.context}", np.arange(self.context, dtype=np.int32))

    @functools.cached_property
    def distance(self) -> Value:
        """How far behind a token a slot is: int32 [1, T, S]."""
        queries = reshaped(self.positions, [1, self.tokens, 1])
        return ops.broadcasting_sub(queries, reshaped(self.slots, [1, 1, self.context]))

    def mask(self, window: int | None) -> Value:
        """What is added to the logits of attention: [1, T, S], 0 or -inf."""

        def given() -> Value:
            return self.computed(
                reshaped(self._function.inputs["causalMask"], [1, self.tokens, self.context])
            )

        def narrowed() -> Value:
            size = self.constant(f"window_{window}", np.array(window, np.int32))
            none = self.constant("minus_infinity", np.array(-np.inf, self.dtype))
            near = ops.broadcasting_greater(size, self.distance)
            return ops.broadcasting_where(near, self.mask(None), none)

        if window is None or window >= self.context:
            return self.once("mask", given)
        return self.once(f"mask_{window}", narrowed)

    @functools.cached_property
    def _placing(self) -> tuple[Value, Value | None]:
        """Which slots are written, as bools [1, S, 1], and with which of several tokens: int32 [S, 1]."""
        token = ops.broadcasting_sub(self.slots, self._function.inputs["position"])
        zero = self.constant("zero", np.zeros(1, np.int32))
        if self.tokens == 1:
            return reshaped(ops.broadcasting_equal(token, zero), [1, self.context, 1]), None
        last = self.constant(f"last_{self.tokens}", np.full(1, self.tokens - 1, np.int32))
        nearest = ops.broadcasting_minimum(ops.broadcasting_maximum(token, zero), last)
        here = ops.broadcasting_equal(token, nearest)
        return reshaped(here, [1, self.context, 1]), reshaped(nearest, [self.context, 1])

    def extend_cache(self, k: Value, v: Value) -> tuple[Value, Value]:
        """The caches of the next layer with new keys and values, [K, T, H], at their positions: [K, S, H]."""
        which, token = self._placing
        both = []
        for new, state in zip((k, v), STATES, strict=True):
            states, written = self._old_caches[state], self._new_caches[state]
            _, _, kv_heads, context, head_dim = states.type.shape
            begin, end = [len(written), 0, 0, 0, 0], [len(written) + 1, 1, kv_heads, context, head_dim]
            old = reshaped(sliced(states, begin, end), [kv_heads, context, head_dim])
            new = ops.cast(new, np.float16) if self.dtype is not np.float16 else new
            if token is not None:
                new = transposed(ops.gather_nd(transposed(new, [1, 0, 2]), token), [1, 0, 2])
            written.append(ops.broadcasting_where(which, new, old))
            both.append(self.computed(written[-1]))
        self.key_values = (both[0], both[1])
        return self.key_values

    def write_caches(self) -> None:
        """Writes both states, each whole and once."""
        for state, written in self._new_caches.items():
            shape = [1, *self._old_caches[state].type.shape[1:]]
            self._function.write(state, ops.concat(0, [reshaped(layer, shape) for layer in written]))


def reshaped(x: Value, shape: Sequence[int]) -> Value:
    return ops.reshape(x, list(shape))


def sliced(x: Value, begin: Sequence[int], end: Sequence[int]) -> Value:
    return ops.slice_(x, list(begin), list(end), [1] * len(begin))


def transposed(x: Value, order: Sequence[int]) -> Value:
    return ops.transpose(x, np.array(order, np.uint32))
