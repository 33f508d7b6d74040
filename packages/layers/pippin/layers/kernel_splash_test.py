"""Splash attention, interpreted on a CPU, against NumPy and the reference kernel in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import ReferenceKernelConfig, SplashKernelConfig
from pippin.layers.position_config import ALiBiConfig
from pippin.layers.testing import assert_close, normal, positions

_B, _T, _N, _K, _H = 2, 256, 4, 2, 16
_KERNEL = SplashKernelConfig(interpret=True, block_size=128)

# Two documents and padding; one document.
_SEGMENTS = np.repeat(np.array([[1, 2, 0], [1, 1, 1]], np.int32), [100, 120, 36], axis=1)
_RESTARTED = np.stack([np.r_[0:100, 0:120, np.full(36, -1)], np.r_[0:256]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """How the logits are made."""

    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    packed: bool = False
    num_kv_heads: int = _K

    @property
    def positions(self) -> np.ndarray:
        return _RESTARTED if self.packed else positions(_B, _T)

    @property
    def segments(self) -> np.ndarray | None:
        return _SEGMENTS if self.packed else None

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """Queries, keys, values and sinks."""
        heads = (_N, self.num_kv_heads, self.num_kv_heads)
        return (*(normal(_B, _T, n, _H, seed=i) for i, n in enumerate(heads)), normal(_N, seed=4))


CASES = {
    "causal": Case(),
    "window": Case(window=50),
    "window beyond the tokens": Case(window=300),
    "capped": Case(soft_cap=2.0),
    "sinks": Case(sinks=True),
    "packed": Case(packed=True),
    "one key head": Case(num_kv_heads=1),
    "a key head each": Case(num_kv_heads=_N),
    "all of them": Case(window=70, soft_cap=2.0, sinks=True, packed=True),
}


def _run(kernel: Any, case: Case, dtype: Any) -> tuple[Any, Any]:
    """The result, and the gradients of a sum of it with random weights where there are tokens."""
    built = kernel.build()
    at = jnp.asarray(case.positions)
    segments = None if case.segments is None else jnp.asarray(case.segments)
    weights = normal(_B, _T, _N, _H, seed=5) * (case.positions >= 0)[:, :, None, None]

    def total(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        logits = Logits(_H**-0.5, case.window, case.soft_cap, None, sinks if case.sinks else None)
        out = built(q, KeyValues(k, v, at, segments, aligned=True), Context(at, segments), logits)
        return jnp.sum(out * jnp.asarray(weights, dtype)), out

    args = tuple(jnp.asarray(a, dtype) for a in case.inputs)
    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*args)
    return out, gradients


@pytest.mark.parametrize("name", CASES)
def test_splash_computes_attention_and_its_gradient(name):
    case = CASES[name]
    out, gradients = _run(_KERNEL, case, jnp.float32)
    *qkv, sinks = case.inputs
    sees = reference.causal(case.positions, case.segments, case.window)
    expected = reference.attend(*qkv, sees, soft_cap=case.soft_cap, sinks=sinks if case.sinks else None)
    tokens = case.positions >= 0
    assert_close(np.asarray(out)[tokens], expected[tokens])
    with jax.enable_x64(True):
        _, exact = _run(ReferenceKernelConfig(), case, jnp.float64)
    for mine, theirs in zip(gradients, exact, strict=True):
        # Sums over up to 256 tokens: those of keys reach 20, those of sinks 100.
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(theirs).max())))


def test_no_token_attends_to_padding_that_has_no_segment():
    q, k, v, _ = (jnp.asarray(a, jnp.float32) for a in Case().inputs)
    at = np.concatenate([np.full((_B, 56), -1), positions(_B, 200)], axis=1).astype(np.int32)
    kv = KeyValues(k, v, jnp.asarray(at), None, aligned=True)
    result = _KERNEL.build()(q, kv, Context(kv.positions), Logits(_H**-0.5))
    expected = ReferenceKernelConfig().build()(q, kv, Context(kv.positions), Logits(_H**-0.5))
    assert_close(result[:, 56:], expected[:, 56:])


def test_bfloat16_keeps_its_dtype():
    out, gradients = _run(_KERNEL, Case(), jnp.bfloat16)
    assert out.dtype == jnp.bfloat16 and {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = _run(_KERNEL, Case(), jnp.float32)
    # Inputs, weights and the result are rounded to 8 bits each: a few steps of 2^-9 of values up to 4.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=4 * 4 * 2**-9, rtol=0)


def test_a_bias_is_refused_rather_than_left_out():
    q, k, v, _ = (jnp.asarray(a, jnp.float32) for a in Case().inputs)
    kv = KeyValues(k, v, jnp.asarray(positions(_B, _T)), None, aligned=True)
    bias = ALiBiConfig(num_heads=_N, head_dim=_H).build().bias
    with pytest.raises(ConfigError, match="SplashKernel: it adds no bias to logits"):
        _KERNEL.build()(q, kv, Context(kv.positions), Logits(1.0, bias=bias))
