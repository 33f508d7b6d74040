"""What the tests of kernels for accelerators share: calls under every mask, against NumPy and the reference kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pippin.layers import reference
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import ReferenceKernelConfig
from pippin.layers.testing import assert_close, normal, positions

BATCH = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """How the logits of a call are made."""

    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    packed: bool = False  # the first row is two documents and padding
    num_heads: int = 4
    num_kv_heads: int = 2


def cases(window: int, beyond: int) -> dict[str, Case]:
    """Every feature by itself, and all of them; `beyond` is a window of more than all tokens."""
    return {
        "causal": Case(),
        "window": Case(window=window),
        "window beyond the tokens": Case(window=beyond),
        "capped": Case(soft_cap=2.0),
        "sinks": Case(sinks=True),
        "packed": Case(packed=True),
        "one key head": Case(num_kv_heads=1),
        "a key head each": Case(num_kv_heads=4),
        "all of them": Case(window=window + 20, soft_cap=2.0, sinks=True, packed=True),
    }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tokens of a call."""

    length: int
    head_dim: int

    def positions(self, case: Case) -> np.ndarray:
        """[B, T]; -1 for padding."""
        if not case.packed:
            return positions(BATCH, self.length)
        first, second, padding = self._documents
        row = np.r_[0:first, 0:second, np.full(padding, -1)]
        return np.stack([row, np.r_[0 : self.length]]).astype(np.int32)

    def segments(self, case: Case) -> np.ndarray | None:
        """[B, T]; 0 for padding."""
        if not case.packed:
            return None
        row = np.repeat(np.array([1, 2, 0], np.int32), self._documents)
        return np.stack([row, np.ones_like(row)])

    @property
    def _documents(self) -> tuple[int, int, int]:
        first, second = 2 * self.length // 5, 9 * self.length // 20
        return first, second, self.length - first - second

    def arrays(self, case: Case) -> tuple[np.ndarray, ...]:
        """Queries, keys, values and sinks."""
        heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        return (
            *(normal(BATCH, self.length, n, self.head_dim, seed=i) for i, n in enumerate(heads)),
            normal(case.num_heads, seed=4),
        )

    def run(self, kernel: Any, case: Case, dtype: Any) -> tuple[Any, Any]:
        """The result, and the gradients of a sum of it with random weights where there are tokens."""
        built = kernel.build()
        at = jnp.asarray(self.positions(case))
        found = self.segments(case)
        segments = None if found is None else jnp.asarray(found)
        weights = normal(BATCH, self.length, case.num_heads, self.head_dim, seed=5)
        weights *= (self.positions(case) >= 0)[:, :, None, None]

        def total(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            logits = Logits(
                self.head_dim**-0.5, case.window, case.soft_cap, None, sinks if case.sinks else None
            )
            out = built(q, KeyValues(k, v, at, segments, aligned=True), Context(at, segments), logits)
            return jnp.sum(out * jnp.asarray(weights, dtype)), out

        args = tuple(jnp.asarray(a, dtype) for a in self.arrays(case))
        gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*args)
        return out, gradients

    def check(self, kernel: Any, case: Case) -> None:
        """Raises unless the kernel has the result and the gradients of float64, as float32 can."""
        out, gradients = self.run(kernel, case, jnp.float32)
        q, k, v, sinks = self.arrays(case)
        at = self.positions(case)
        sees = reference.causal(at, self.segments(case), case.window)
        expected = reference.attend(
            q, k, v, sees, soft_cap=case.soft_cap, sinks=sinks if case.sinks else None
        )
        assert_close(np.asarray(out)[at >= 0], expected[at >= 0])
        with jax.enable_x64(True):
            _, exact = self.run(ReferenceKernelConfig(), case, jnp.float64)
        for mine, theirs in zip(gradients, exact, strict=True):
            # Sums over all tokens: the largest of them has the most roundings.
            most = max(1.0, float(np.abs(theirs).max()))
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5 * most)

    def check_padding_without_segments(self, kernel: Any) -> None:
        """Raises unless tokens behind padding are those of a row without it."""
        q, k, v, _ = (jnp.asarray(a, jnp.float32) for a in self.arrays(Case()))
        padding = self.length // 4
        at = jnp.asarray(np.maximum(positions(BATCH, self.length) - padding, -1))
        kv = KeyValues(k, v, at, None, aligned=True)
        mine, theirs = (
            cfg.build()(q, kv, Context(at), Logits(self.head_dim**-0.5))
            for cfg in (kernel, ReferenceKernelConfig())
        )
        assert_close(mine[:, padding:], theirs[:, padding:])

    def check_bfloat16(self, kernel: Any) -> None:
        """Raises unless bfloat16 stays what it is, and is near float32."""
        out, gradients = self.run(kernel, Case(), jnp.bfloat16)
        assert out.dtype == jnp.bfloat16 and {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
        exact, _ = self.run(kernel, Case(), jnp.float32)
        # Inputs, weights and the result are rounded to 8 bits each: a few steps of 2^-9 of values up to 4.
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=4 * 4 * 2**-9, rtol=0)
