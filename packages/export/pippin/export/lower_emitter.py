"""A function of a program while it is written, and the rules by which components are written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pippin.core.config import Config
from pippin.export.coreml_tools import Builder as mb
from pippin.export.lower_weights import Blocks, Dense, Table, Weights
from pippin.export.lowering_rules import Rules

_UNSEEN = -30_000.0  # added to a logit: its weight is 0, and the sum a number of float16

Var = Any  # a value of the program: coremltools' Var

_RULES = Rules("as a Core ML program")
rule, require_rules = _RULES.rule, _RULES.require


class Emitter:
    """What rules write one function with.

    Queries and keys are [1, heads, T, H], and caches [1, kv_heads, S, H]: T tokens of a call, S slots of the context.
    """

    def __init__(
        self,
        weights: Weights,
        inputs: dict[str, Var],
        *,
        tokens: int,
        context: int,
        adapter_slots: dict[str, tuple[int, tuple[int, ...]]],
    ):
        """
        Args:
            weights: of the model, for all functions.
            inputs: of the function, by name.
            tokens: of a call.
            context: slots of the caches.
            adapter_slots: name of a matrix -> where it lies in the input `adapter`, and its shape.
        """
        self.weights, self.tokens, self.context = weights, tokens, context
        self._inputs, self._adapter_slots = inputs, adapter_slots
        self._weights_here: dict[str, Var] = {}
        self._made: dict[str, Any] = {}
        self._new_caches: tuple[list[Var], list[Var]] = ([], [])
        self._old_caches = tuple(mb.read_state(input=inputs[name]) for name in ("keyCache", "valueCache"))
        self._last_sum: tuple[Var, Var, Var] | None = None  # a sum, and its two terms
        self.key_values: tuple[Var, Var] | None = None  # of the last layer that made some

    def emit(self, cfg: Config, path: str, *args: Any) -> Any:
        """Writes a component. `path` is that of its parameters."""
        return _RULES[type(cfg)](self, cfg, path, *args)

    def weight(self, name: str, *, transposed: bool = False) -> Var:
        """A weight as a value: stored once for all functions, and read once in this one."""
        if name not in self._weights_here:
            label = name.replace(".", "_")
            match self.weights.stored(name, transposed=transposed):
                case Dense(values):
                    self._weights_here[name] = _shared(name, values, label)
                case Table(indices, lut):
                    self._weights_here[name] = mb.constexpr_lut_to_dense(
                        indices=_shared(f"{name}.indices", indices, f"{label}_indices"),
                        lut=_shared(f"{name}.luts", lut, f"{label}_luts"),
                        name=label,
                    )
                case Blocks(data, scale):
                    self._weights_here[name] = mb.constexpr_blockwise_shift_scale(
                        data=_shared(f"{name}.values", data, f"{label}_values"),
                        scale=_shared(f"{name}.scales", scale, f"{label}_scales"),
                        name=label,
                    )
        return self._weights_here[name]

    def constant(self, name: str, values: np.ndarray) -> Var:
        """Numbers that are no weights, under a name that says what they are: stored once for all functions."""
        stored = self.weights.constant(name, values)
        label = f"constants_{name}".replace(".", "_")
        return self.once(label, lambda: _shared(f"constants.{name}", stored, label))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What layers have in common, made by the first of them that asks for it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def low_rank(self, path: str, x: Var) -> Var | None:
        """What the adapter adds to the linear map at a path; None where it has no room for it."""
        down, up = (self._adapter_slots.get(f"{path}.{end}") for end in ("down", "up"))
        if down is None or up is None:
            return None
        return mb.matmul(x=mb.matmul(x=x, y=self._of_adapter(*down)), y=self._of_adapter(*up))

    def _of_adapter(self, offset: int, shape: tuple[int, ...]) -> Var:
        end = offset + int(np.prod(shape))
        return mb.reshape(
            x=mb.slice_by_index(x=self._inputs["adapter"], begin=[offset], end=[end]), shape=list(shape)
        )

    @functools.cached_property
    def ids(self) -> Var:
        """The tokens' ids: int32 [1, T]."""
        return self._inputs["inputIds"]

    @functools.cached_property
    def positions(self) -> Var:
        """Where the tokens stand: int32 [T]."""
        steps = self.constant(f"tokens_{self.tokens}", np.arange(self.tokens, dtype=np.int32))
        return mb.add(x=steps, y=self._inputs["position"])

    @functools.cached_property
    def slots(self) -> Var:
        """The positions of the caches' slots: int32 [S]."""
        return self.constant(f"slots_{self.context}", np.arange(self.context, dtype=np.int32))

    @functools.cached_property
    def distance(self) -> Var:
        """How far behind a token a slot is: int32 [1, 1, T, S]."""
        queries = mb.reshape(x=self.positions, shape=[1, 1, self.tokens, 1])
        return mb.sub(x=queries, y=mb.reshape(x=self.slots, shape=[1, 1, 1, self.context]))

    def residual(self, x: Var, added: Var) -> Var:
        """`x + added`. What float16 cuts off of it is added to the next sum of which it is the first term.

        Dozens of layers would otherwise each lose half a unit of the last place.

        Source: Kahan 1965, Communications of the ACM 8(1), page 40.
        """
        if self._last_sum is not None and self._last_sum[0] is x:
            total, before, last = self._last_sum
            lost = mb.sub(x=last, y=mb.sub(x=total, y=before))
            added = mb.add(x=added, y=lost)
        self._last_sum = (mb.add(x=x, y=added), x, added)
        return self._last_sum[0]

    def mask(self, window: int | None) -> Var:
        """What is added to the logits of attention: float16 [1, 1, T, S]."""
        # Not -inf: a row of padding may see no key, and its NaN would reach the caches.
        given = self.once("mask", lambda: mb.maximum(x=self._inputs["causalMask"], y=np.float16(_UNSEEN)))
        if window is None or window >= self.context:
            return given

        def narrowed() -> Var:
            near = mb.less(x=self.distance, y=np.int32(window))
            return mb.select(cond=near, a=given, b=np.float16(_UNSEEN))

        return self.once(f"mask_{window}", narrowed)

    @functools.cached_property
    def _placing(self) -> tuple[Var, Var]:
        """Which slots are written, as bools [1, 1, S, 1], and which token goes where, as ones: float16 [1, 1, S, T]."""
        slots = mb.reshape(x=self.slots, shape=[1, 1, self.context, 1])
        tokens = mb.reshape(x=self.positions, shape=[1, 1, 1, self.tokens])
        here = mb.equal(x=slots, y=tokens)
        ones = mb.cast(x=here, dtype="fp16")
        if self.tokens == 1:
            return here, ones
        first = self._inputs["position"]
        behind = mb.greater_equal(x=slots, y=first)
        before = mb.less(x=slots, y=mb.add(x=first, y=np.int32(self.tokens)))
        return mb.logical_and(x=behind, y=before), ones

    def extend_cache(self, k: Var, v: Var) -> tuple[Var, Var]:
        """The caches of the next layer with new keys and values, [1, K, T, H], at their positions: [1, K, S, H]."""
        both = []
        for new, states, written in zip((k, v), self._old_caches, self._new_caches, strict=True):
            layer = len(written)
            old = mb.slice_by_index(
                x=states,
                begin=[layer, 0, 0, 0, 0],
                end=[layer + 1, *states.shape[1:]],
                squeeze_mask=[True, False, False, False, False],
            )
            which, ones = self._placing
            placed = mb.mul(x=ones, y=new) if self.tokens == 1 else mb.matmul(x=ones, y=new)
            written.append(mb.select(cond=which, a=placed, b=old))
            both.append(written[-1])
        self.key_values = (both[0], both[1])
        return self.key_values

    def write_caches(self) -> None:
        """Writes both states, each whole and once: what Core ML keeps reliably."""
        for name, written in zip(("keyCache", "valueCache"), self._new_caches, strict=True):
            mb.coreml_update_state(state=self._inputs[name], value=mb.stack(values=written, axis=0))


def scalar(value: float) -> np.float16:
    """A number as the program's arithmetic has it."""
    return np.float16(value)


def reshaped(x: Var, shape: Sequence[int]) -> Var:
    return mb.reshape(x=x, shape=list(shape))


def _shared(weight_id: str, values: np.ndarray, label: str) -> Var:
    value = mb.const(val=values, name=label)
    value.op.weight_id = weight_id
    return value
