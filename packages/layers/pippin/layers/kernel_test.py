"""Attention kernels against each other and against NumPy in float64, under every mask."""

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
from pippin.layers.kernel_config import BlockwiseKernelConfig, ReferenceKernelConfig
from pippin.layers.position_config import ALiBiConfig
from pippin.layers.testing import assert_exact, check_gradients, float64_fixture, normal, positions

_float64 = float64_fixture()

_B, _T, _N, _K, _H = 2, 7, 4, 2, 4
_SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]], np.int32)
_RESTARTED = np.array([[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]], np.int32)

KERNELS = {
    "reference": ReferenceKernelConfig(),
    "blocks of 1": BlockwiseKernelConfig(block_size=1),
    "blocks of 3": BlockwiseKernelConfig(block_size=3),
    "one block": BlockwiseKernelConfig(),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """How the logits are made."""

    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    packed: bool = False

    @property
    def positions(self) -> np.ndarray:
        return _RESTARTED if self.packed else positions(_B, _T)

    @property
    def segments(self) -> np.ndarray | None:
        return _SEGMENTS if self.packed else None

    def logits(self, sinks: Any) -> Logits:
        alibi = ALiBiConfig(num_heads=_N, head_dim=_H).build()
        bias = alibi.bias if self.alibi else None
        return Logits(_H**-0.5, self.window, self.soft_cap, bias, sinks if self.sinks else None)


CASES = {
    "causal": Case(),
    "window of 1": Case(window=1),
    "window of 3": Case(window=3),
    "window beyond the tokens": Case(window=20),
    "capped": Case(soft_cap=2.0),
    "alibi": Case(alibi=True),
    "sinks": Case(sinks=True),
    "packed": Case(packed=True),
    "all of them": Case(window=2, soft_cap=2.0, alibi=True, sinks=True, packed=True),
}


def _run(kernel: Any, case: Case, aligned: bool = True) -> Any:
    """The kernel as a function of queries, keys, values and sinks."""
    built = kernel.build()

    @jax.jit
    def run(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        at = jnp.asarray(case.positions)
        segments = None if case.segments is None else jnp.asarray(case.segments)
        kv = KeyValues(k, v, at, segments, aligned=aligned)
        return built(q, kv, Context(at, segments), case.logits(sinks))

    return run


def _inputs(dtype: Any = np.float64) -> tuple[Any, ...]:
    q, k, v = normal(_B, _T, _N, _H, seed=1), normal(_B, _T, _K, _H, seed=2), normal(_B, _T, _K, _H, seed=3)
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v, normal(_N, seed=4)))


def _expected(case: Case) -> np.ndarray:
    q, k, v, sinks = map(np.asarray, _inputs())
    at = case.positions
    return reference.attend(
        q,
        k,
        v,
        reference.causal(at, case.segments, case.window),
        soft_cap=case.soft_cap,
        slopes=2.0 ** (-2 * np.arange(1, 5)) if case.alibi else None,
        sinks=sinks if case.sinks else None,
        distance=lambda b, t, s: at[b, t] - at[b, s],
    )


@pytest.mark.parametrize(
    "kernel, case",
    [(kernel, case) for kernel in ("reference", "blocks of 3") for case in CASES]
    + [(kernel, "all of them") for kernel in ("blocks of 1", "one block")],
)
def test_every_kernel_computes_the_same_attention(kernel, case):
    result = _run(KERNELS[kernel], CASES[case])(*_inputs())
    assert_exact(result, _expected(CASES[case]))


@pytest.mark.parametrize("kernel", ["reference", "blocks of 3"])
def test_keys_that_are_not_aligned_are_masked_by_their_positions(kernel):
    # As in a cache: slots in any order, some of them empty.
    q, k, v, _ = _inputs()
    order = np.array([4, 6, 2, 0, 1, 3, 5])
    held = np.where(order < 5, order, -1).astype(np.int32)
    built = KERNELS[kernel].build()

    @jax.jit
    def run(q, k, v):
        kv = KeyValues(k, v, jnp.tile(held, (_B, 1)), None, aligned=False)
        return built(q, kv, Context(jnp.asarray(positions(_B, _T))), Case(window=4).logits(None))

    def sees(b, t, s):
        return s < 5 and 0 <= t - s < 4

    expected = reference.attend(np.asarray(q), np.asarray(k), np.asarray(v), sees)
    rows = [t for t in range(_T) if any(sees(0, t, s) for s in range(_T))]
    assert_exact(run(q, k[:, order], v[:, order])[:, rows], expected[:, rows])


@pytest.mark.parametrize("kernel", ["reference", "blocks of 3"])
def test_kernels_have_the_gradient_of_their_differences(kernel):
    check_gradients(_run(KERNELS[kernel], CASES["all of them"]), *_inputs())


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token_of_one_head_attends_to_itself(kernel):
    q = jnp.ones((1, 1, 1, 2))
    kv = KeyValues(q, 3 * q, jnp.zeros((1, 1), jnp.int32), None, aligned=True)
    assert_exact(KERNELS[kernel].build()(q, kv, Context(kv.positions), Logits(1.0)), 3 * q)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing_is_finite_and_so_are_the_gradients(sinks):
    q, k, v, sink = _inputs()
    built = BlockwiseKernelConfig(block_size=3).build()
    padding = jnp.full((_B, _T), -1, jnp.int32)

    def total(q, k, v, sink):
        kv = KeyValues(k, v, padding, None, aligned=True)
        return jnp.sum(jnp.square(built(q, kv, Context(padding), Case(sinks=sinks).logits(sink))))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(q, k, v, sink)
    assert all(np.isfinite(a).all() for a in (value, *gradients))


def test_blocks_leave_out_the_keys_that_no_query_of_theirs_sees():
    q, k, v, sinks = _inputs()
    # NaN survives a weight of zero, so that a finite result was computed without it.
    later, outside = v.at[:, 3:].set(np.nan), v.at[:, :2].set(np.nan)
    kernel = KERNELS["blocks of 3"]
    assert np.isfinite(_run(kernel, Case())(q, k, later, sinks)[:, :3]).all()
    assert np.isfinite(_run(kernel, Case(window=2))(q, k, outside, sinks)[:, 3:]).all()


_LONG = 37  # 18 blocks of two, and one token


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_many_blocks_run_in_loops_of_the_same_numbers(window, aligned):
    q, k, v = (jnp.asarray(normal(1, _LONG, n, _H, seed=i)) for i, n in enumerate((_N, _K, _K)))
    weights = jnp.asarray(normal(*q.shape, seed=3))

    def results(kernel: Any) -> Any:
        built, at = kernel.build(), jnp.asarray(positions(1, _LONG))
        segments = jnp.asarray(np.repeat(np.array([[1, 2]], np.int32), [15, _LONG - 15], axis=1))

        def total(q, k, v, sinks):
            out = built(
                q,
                KeyValues(k, v, at, segments, aligned),
                Context(at, segments),
                Logits(0.5, window, 2.0, None, sinks),
            )
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, jnp.ones(_N))

    jax.tree.map(assert_exact, results(BlockwiseKernelConfig(block_size=2)), results(ReferenceKernelConfig()))


def _compiled(length: int, window: int | None) -> Any:
    """The gradient of attention over some tokens of one head, in blocks of 16."""
    built = BlockwiseKernelConfig(block_size=16).build()

    def total(q, k, v):
        at = jnp.arange(length, dtype=jnp.int32)[None]
        return jnp.sum(built(q, KeyValues(k, v, at, None, aligned=True), Context(at), Logits(0.5, window)))

    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x)


@pytest.mark.parametrize("window", [None, 40])
def test_neither_program_nor_memory_grow_with_the_square_of_the_length(window):
    short, long = (_compiled(length, window) for length in (1024, 2048))
    operations = [len(program.as_text().splitlines()) for program in (short, long)]
    assert operations[0] == operations[1]
    sizes = [program.compile().memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert sizes[1] < 2.2 * sizes[0]


def test_bfloat16_attention_keeps_its_dtype_and_sums_in_float32():
    inputs, run = _inputs(jnp.bfloat16), _run(KERNELS["one block"], CASES["all of them"])
    result, exact = run(*inputs), run(*(a.astype(jnp.float64) for a in inputs))
    assert result.dtype == jnp.bfloat16
    # Queries are scaled, weights and the result rounded to 8 bits each: a few steps of 2^-9 of values up to 3.
    np.testing.assert_allclose(result.astype(jnp.float64), exact, atol=4 * 3 * 2**-9, rtol=0)


def test_a_block_holds_a_query():
    with pytest.raises(ConfigError, match=r"block_size \(0\) must be at least 1"):
        BlockwiseKernelConfig(block_size=0)
