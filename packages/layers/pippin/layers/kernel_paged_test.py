"""Kernels that read pages, interpreted on a CPU where they are of another machine, against NumPy in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.literals import TypedInt
from jax.experimental import pallas as pl

from pippin.core.errors import ConfigError
from pippin.layers import configs, kernel, reference
from pippin.layers.context import Context, KeyValues, PagedKeyValues
from pippin.layers.int8 import quantized
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import AttentionShape, choose
from pippin.layers.position_config import ALiBiConfig
from pippin.layers.testing import CLOSE, EXACT, normal, positions

_PAGE, _PAGES = 4, 5  # tokens, and pages of a row
_N, _K = 4, 2
_LENGTHS = (17, 1, 6, 12, 0)  # of the rows, new tokens included


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a kernel is tested."""

    config: Any
    head_dim: int = 16
    dtype: Any = jnp.float32


KERNELS = {
    "reference": Kernel(configs.ReferenceKernelConfig(), dtype=jnp.float64),
    "blocks of a page": Kernel(configs.PagedBlockwiseKernelConfig(block_size=1), dtype=jnp.float64),
    "blocks of two pages": Kernel(configs.PagedBlockwiseKernelConfig(block_size=8), dtype=jnp.float64),
    "one block": Kernel(configs.PagedBlockwiseKernelConfig(), dtype=jnp.float64),
    "triton": Kernel(configs.PagedTritonKernelConfig(block_size=16, interpret=True)),
    "tpu": Kernel(configs.PagedTPUKernelConfig(block_size=8), head_dim=128),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What the queries are, and how their logits are made."""

    queries: tuple[int, ...] = (1, 1, 1, 1, 1)  # the new tokens of each row; those of the last are padding
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False

    @property
    def positions(self) -> np.ndarray:
        at = np.full((len(_LENGTHS), max(self.queries)), -1, np.int32)
        for b, (length, new) in enumerate(zip(_LENGTHS, self.queries, strict=True)):
            if length:
                at[b, :new] = np.arange(length - new, length)
        return at


_CHUNKS = (7, 1, 6, 2, 1)  # a part of a prompt, the first token, a whole prompt, two tokens, and nothing
CASES = {
    "decoding": Case(),
    "chunks": Case(_CHUNKS),
    "window": Case(_CHUNKS, window=5),
    "window of 1": Case(window=1),
    "capped": Case(_CHUNKS, soft_cap=2.0),
    "sinks": Case(_CHUNKS, sinks=True),
    "alibi": Case(_CHUNKS, alibi=True),
    "most of them": Case(_CHUNKS, window=6, soft_cap=2.0),
    "all of them": Case(_CHUNKS, window=6, soft_cap=2.0, sinks=True, alibi=True),
}


@functools.cache
def _keys(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(_LENGTHS), _PAGE * _PAGES, _K, head_dim)
    return normal(*shape, seed=1), normal(*shape, seed=2)


def _paged(case: Case, tested: Kernel) -> PagedKeyValues:
    """The keys in pages in no order. NaN is whatever no row has: the rest of a page, and pages of none."""
    used = [-(-length // _PAGE) for length in _LENGTHS]
    order = iter(np.random.default_rng(0).permutation(sum(used) + 3).tolist())
    pages = np.full((sum(used) + 3, _PAGE, 2 * _K, tested.head_dim), np.nan)
    tables = np.full((len(_LENGTHS), _PAGES), -1, np.int32)
    for b, length in enumerate(_LENGTHS):
        for i in range(used[b]):
            tables[b, i] = page = next(order)
            held = slice(i * _PAGE, min((i + 1) * _PAGE, length))
            for part, values in enumerate(_keys(tested.head_dim)):
                pages[page, : held.stop - held.start, part::2] = values[b, held]
    at = case.positions
    new = jnp.zeros((*at.shape, _K, tested.head_dim), tested.dtype)
    return PagedKeyValues(
        new, new, jnp.asarray(at), None, False, jnp.asarray(pages, tested.dtype), jnp.asarray(tables)
    )


def _check(tested: Kernel, case: Case) -> None:
    at, dim = case.positions, tested.head_dim
    q, sinks = normal(*at.shape, _N, dim, seed=3), normal(_N, seed=4)
    bias = ALiBiConfig(num_heads=_N, head_dim=dim).build().bias if case.alibi else None
    kv = _paged(case, tested)

    @jax.jit
    def run(q: Any, sinks: Any, kv: Any) -> Any:
        logits = Logits(dim**-0.5, case.window, case.soft_cap, bias, sinks if case.sinks else None)
        return tested.config.build()(q, kv, Context(kv.positions), logits)

    result = np.asarray(run(jnp.asarray(q, tested.dtype), jnp.asarray(sinks, tested.dtype), kv))

    def sees(b: int, t: int, s: int) -> bool:
        distance = at[b, t] - s
        return bool(distance >= 0 and (case.window is None or distance < case.window))

    expected = reference.attend(
        q,
        *_keys(dim),
        sees,
        soft_cap=case.soft_cap,
        sinks=sinks if case.sinks else None,
        slopes=2.0 ** (-2 * np.arange(1, 5)) if case.alibi else None,
        distance=lambda b, t, s: int(at[b, t]) - s,
    )
    assert np.isfinite(result).all()
    tolerance = EXACT if tested.dtype == jnp.float64 else CLOSE
    np.testing.assert_allclose(result[at >= 0], expected[at >= 0], **tolerance)


@pytest.mark.parametrize(
    "name, case",
    [(name, case) for name in ("reference", "blocks of two pages") for case in CASES]
    + [(name, "all of them") for name in ("blocks of a page", "one block")]
    + [("triton", case) for case in CASES if not CASES[case].alibi],
)
def test_every_kernel_attends_to_what_the_pages_of_a_row_hold(name, case):
    with jax.enable_x64(KERNELS[name].dtype == jnp.float64):
        _check(KERNELS[name], CASES[case])


@pytest.mark.parametrize("case", ["decoding", "chunks", "window", "capped", "most of them"])
def test_so_does_the_kernel_of_tpus(case, monkeypatch):
    # JAX's kernel has no argument for it to be interpreted, and the interpreter of JAX 0.12 asks constant indices for
    # a shape, which they lack. It drops what a program writes to prefetched scalars, too, by which the kernel's blocks
    # of queries know where the last one ended: all queries here are one block.
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(TypedInt, "shape", (), raising=False)
    monkeypatch.setattr(kernel, "platform_in_use", lambda: "tpu")
    _check(KERNELS["tpu"], CASES[case])


@pytest.mark.parametrize("name", ["blocks of two pages"])
def test_attention_to_int8_pages_errs_by_what_half_a_step_does(name):
    case = CASES["window"]
    tested = dataclasses.replace(KERNELS[name], dtype=jnp.float32)
    at, dim = case.positions, tested.head_dim
    floats = _paged(case, tested)
    numbers, scales = quantized(np.asarray(floats.pages, np.float64))
    # What no row has stays NaN: its scale is.
    kv = dataclasses.replace(floats, pages=jnp.asarray(numbers), scales=jnp.asarray(scales))
    q = normal(*at.shape, _N, dim, seed=3)

    def attend(kv: PagedKeyValues) -> np.ndarray:
        def run(q: Any) -> Any:
            return tested.config.build()(q, kv, Context(kv.positions), Logits(dim**-0.5, case.window))

        return np.asarray(jax.jit(run)(jnp.asarray(q, tested.dtype)), np.float64)

    got, expected = attend(kv)[at >= 0], attend(floats)[at >= 0]
    keys, values = (np.abs(part) for part in _keys(dim))
    # Half a step of a key moves a logit by as much of the query's sum; a weight then by a factor, and its value by half a step.
    moved = dim**-0.5 * np.abs(q[at >= 0]).sum(axis=-1, keepdims=True) * keys.max() / 127 / 2
    bound = np.expm1(2 * moved) * values.max() + values.max() / 127 / 2
    assert np.isfinite(got).all()
    assert 1e-4 < np.abs(got - expected).max()
    assert np.all(np.abs(got - expected) <= bound)


def test_memory_does_not_grow_with_the_pages_of_a_row():
    def size(count: int) -> int:
        def run(q: Any, new: Any, at: Any, pages: Any, tables: Any) -> Any:
            kv = PagedKeyValues(new, new, at, None, False, pages, tables)
            return KERNELS["blocks of two pages"].config.build()(q, kv, Context(at), Logits(1.0))

        shapes = (8, 1, _N, 16), (8, 1, _K, 16), (64, _PAGE, 2 * _K, 16)
        q, new, pages = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        at, tables = (jax.ShapeDtypeStruct((8, n), jnp.int32) for n in (1, count))
        stats: Any = jax.jit(run).lower(q, new, at, pages, tables).compile().memory_analysis()
        return stats.temp_size_in_bytes

    assert size(4096) - size(512) < 2 * 8 * 4096 * 4  # tables alone, and not 8 * 4096 * _PAGE keys


_SHAPE = AttentionShape(
    platform="tpu",
    query_length=1,
    key_length=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    dtype="bfloat16",
    aligned=False,
    page_size=16,
)
_TRITON, _ON_TPU = configs.PagedTritonKernelConfig, configs.PagedTPUKernelConfig


@pytest.mark.parametrize(
    "cfg, change, reason",
    [
        (_ON_TPU(), {"page_size": 0}, "keys are in no pages, as those of a PagedCache are"),
        (_ON_TPU(), {"platform": "gpu"}, "it runs on TPUs, and this is a gpu"),
        (_ON_TPU(), {"int8_pages": True}, "it reads no int8 pages with a scale for each token and head"),
        (_ON_TPU(), {"dtype": "float16"}, "it computes in float32 or bfloat16, not float16"),
        (_ON_TPU(), {"head_dim": 64}, "head_dim (64) is no multiple of 128"),
        (
            _ON_TPU(),
            {"num_kv_heads": 6, "num_heads": 6},
            "a device's 6 key heads do not fill its registers",
        ),
        (_ON_TPU(), {"has_bias": True}, "it adds no bias to logits"),
        (_ON_TPU(), {"has_sinks": True}, "it has no sinks"),
        (_ON_TPU(), {"head_shards": 2}, "the mesh splits query heads 2 ways and key heads 1 ways"),
        (_TRITON(), {"page_size": 0}, "keys are in no pages, as those of a PagedCache are"),
        (_TRITON(), {"platform": "tpu"}, "it runs on NVIDIA GPUs, and this is a tpu"),
        (_TRITON(), {"int8_pages": True}, "it reads no int8 pages with a scale for each token and head"),
        (_TRITON(), {"dtype": "float64"}, "it computes in float16, bfloat16 or float32, not float64"),
        (_TRITON(), {"head_dim": 96}, "head_dim (96) is no power of two from 16 to 256"),
        (_TRITON(), {"page_size": 128}, "pages of 128 tokens are more than block_size (64)"),
        (_TRITON(), {"has_bias": True}, "it adds no bias to logits"),
        (_TRITON(), {"head_shards": 2}, "the mesh splits query heads 2 ways and key heads 1 ways"),
    ],
)
def test_a_kernel_says_what_it_cannot_serve(cfg, change, reason):
    shape = dataclasses.replace(_SHAPE, platform="gpu" if isinstance(cfg, _TRITON) else "tpu")
    assert cfg.supports(shape) == ""
    assert cfg.supports(dataclasses.replace(shape, **change)) == reason


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, configs.PagedTPUKernelConfig),
        ({"has_sinks": True}, configs.PagedBlockwiseKernelConfig),
        ({"platform": "gpu"}, configs.PagedTritonKernelConfig),
        ({"platform": "gpu", "has_sinks": True, "dtype": "float32"}, configs.PagedTritonKernelConfig),
        ({"int8_pages": True}, configs.PagedBlockwiseKernelConfig),
        ({"platform": "gpu", "int8_pages": True}, configs.PagedBlockwiseKernelConfig),
        ({"platform": "cpu"}, configs.PagedBlockwiseKernelConfig),
    ],
)
def test_the_first_kernel_that_supports_the_call_is_chosen(change, expected):
    chosen, _ = choose(
        configs.SelectKernelConfig(kernels=configs.PAGED_KERNELS), dataclasses.replace(_SHAPE, **change)
    )
    assert isinstance(chosen, expected)


def test_pages_and_kernels_that_do_not_fit_are_refused():
    q = jnp.ones((2, 1, 4, 16))
    kv = KeyValues(q, q, jnp.asarray(positions(2, 1)), None, aligned=False)
    with pytest.raises(ConfigError, match="PagedBlockwiseKernel: keys are in no pages"):
        configs.PagedBlockwiseKernelConfig().build()(q, kv, Context(kv.positions), Logits(1.0))
    in_pages = _paged(Case(), Kernel(None))
    q = jnp.ones((5, 1, 4, 16))
    with pytest.raises(
        ConfigError, match="BlockwiseKernel: keys are in pages, which .* use the modifier paged"
    ):
        configs.SelectKernelConfig().build()(q, in_pages, Context(in_pages.positions), Logits(1.0))


@pytest.mark.parametrize(
    "cfg", [_TRITON, _ON_TPU, configs.PagedBlockwiseKernelConfig], ids=lambda cfg: cfg.__name__
)
def test_blocks_are_powers_of_two(cfg):
    with pytest.raises(ConfigError, match=r"a block's size \(24\) must be a power of two"):
        cfg(block_size=24)
