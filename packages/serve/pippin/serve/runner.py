"""The runner: computes the tokens of a step with a model, in programs of a few fixed shapes."""

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.config import Config
from pippin.core.config_tree import transform
from pippin.core.module import Params, merge, parameter_infos, split
from pippin.layers.cache_paged import assign_pages, map_cache
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.context import Cache
from pippin.layers.kernel_config import SelectKernelConfig
from pippin.layers.kernel_paged_config import paged
from pippin.serve.engine.request import Sampled
from pippin.serve.engine.scheduler import Limits, Row, doublings
from pippin.serve.form import Form
from pippin.serve.placement import Placement
from pippin.serve.sampler import Sampler, compiler_options

# The least tokens of a program for prompts: from 36 on, products on a CPU sum in one order (see `Limits.answer_rows`).
_LEAST_CHUNK_TOKENS = 64

_PLAIN = Form()

_COMPILING_THREADS = 2  # the compiler itself has more


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Tokens that are a row of a program, or the start of one."""

    row: Row
    start: int  # in the tokens of the row
    stop: int

    def asking(self) -> Row | None:
        """What the token behind it is chosen for: none, unless it ends with the history or a draft."""
        num_drafts = self.stop - (len(self.row.tokens) - len(self.row.drafts))
        if num_drafts == 0:
            return self.row
        return self.row.after(num_drafts) if num_drafts > 0 else None


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program, and the shapes of what it is given."""

    program: jax.stages.Lowered
    params: Params
    cache: Cache


class ModelRunner:
    """Computes steps with a model, its cache in pages, and a sampler.

    Tokens of prompts and tokens of answers are computed by different programs, and each kind always in the same order
    of operations, whatever rows there are beside: an answer is the same, bit by bit, alone or in a full batch.
    """

    def __init__(
        self,
        cfg: CausalLMConfig,
        params: Mapping[str, Any],
        limits: Limits,
        form: Form = _PLAIN,
    ):
        """Takes a trained model's config and its parameters, the sizes, and the form to serve it in.

        Raises:
            ShardingError: so many devices cannot share the model.
        """
        cfg, params = form.of(cfg, params)
        cfg = _in_pages(cfg, limits.page_size, limits.num_pages, form.int8_cache)
        self.limits = limits
        self._table_size = _table_size(limits)
        model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
        definition, _ = split(model)
        self._params: Params = (
            jax.tree.map(jnp.asarray, params)
            if form.placement is None
            else form.placement.place(parameter_infos(model), params)
        )
        self._empty, self._step = _functions(definition, self._params, limits, form.placement)
        self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}  # shape -> program, once warmed up
        self._sampler = Sampler(cfg.vocab_size)
        self._cache: Cache = self._empty(self._params)

    def reset(self) -> None:
        """Makes the cache anew. What pages held is lost."""
        self._cache = None  # before the new one: two may not fit
        self._cache = self._empty(self._params)

    def run(self, rows: Sequence[Row]) -> list[list[Sampled]]:
        """Computes a step; see `pippin.serve.engine.engine.Runner`."""
        computed = [(pieces, self._compute(pieces, shape)) for pieces, shape in self._split(rows)]
        sampled: dict[str, list[Sampled]] = {row.request_id: [] for row in rows}
        for pieces, logits in computed:
            asking = [piece.asking() for piece in pieces] + [None] * (logits.shape[0] - len(pieces))
            for row, result in zip(asking, self._sampler(logits, asking), strict=True):
                if row is not None and result is not None:
                    sampled[row.request_id].append(result)
        return [sampled[row.request_id] for row in rows]

    def shapes(self) -> list[tuple[int, int]]:
        """Rows and tokens a row of all programs."""
        return [
            *((count, 1) for count in self.limits.answer_rows),
            *((n, self.limits.row_tokens) for n in self._chunk_counts()),
        ]

    def warm_up(self, told: Callable[[tuple[int, int], float], None] = lambda shape, seconds: None) -> None:
        """Compiles all programs, or gets them from JAX's cache of compiled programs, some at a time.

        Args:
            told: gets each shape, and how many seconds it took.
        """

        def compiled(shape: tuple[int, int]) -> tuple[float, jax.stages.Compiled]:
            start = time.monotonic()
            program = self._step.lower(self._params, cache, *self._inputs([], shape)).compile()
            return time.monotonic() - start, program

        # Not the arrays, which the first program to be run takes over.
        cache = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self._cache
        )
        # While one is traced, which takes Python's lock, others are compiled or read.
        with concurrent.futures.ThreadPoolExecutor(_COMPILING_THREADS) as threads:
            for shape, (seconds, program) in zip(
                self.shapes(), threads.map(compiled, self.shapes()), strict=True
            ):
                self._programs[shape] = program
                self._sampler.warm_up(self._compute([], shape))
                told(shape, seconds)

    def _chunk_counts(self) -> list[int]:
        size = self.limits.row_tokens
        return doublings(-(-_LEAST_CHUNK_TOKENS // size), self.limits.chunk_tokens // size)

    def _split(self, rows: Sequence[Row]) -> Iterator[tuple[list[_Piece], tuple[int, int]]]:
        """What each program computes, and its shape."""
        size = self.limits.row_tokens
        for counts, tokens, chosen in (
            (self._chunk_counts(), size, [row for row in rows if row.is_prompt]),
            (self.limits.answer_rows, 1, [row for row in rows if not row.is_prompt]),
        ):
            pieces = [
                _Piece(row, start, min(start + tokens, len(row.tokens)))
                for row in chosen
                for start in range(0, len(row.tokens), tokens)
            ]
            for start in range(0, len(pieces), counts[-1]):
                part = pieces[start : start + counts[-1]]
                yield part, (next(n for n in counts if n >= len(part)), tokens)

    def _compute(self, pieces: Sequence[_Piece], shape: tuple[int, int]) -> Float[Array, "R V"]:
        """The logits after the last token of each piece."""
        program: Any = self._programs.get(shape, self._step)
        logits, self._cache = program(self._params, self._cache, *self._inputs(pieces, shape))
        return logits.addressable_data(0)  # that of the first device, where several have the same

    def _inputs(self, pieces: Sequence[_Piece], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """The tokens, positions, tables of pages and places to read of a program."""
        tokens, read = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        positions = np.full(shape, -1, np.int32)
        tables = np.full((shape[0], self._table_size), -1, np.int32)
        for i, piece in enumerate(pieces):
            count, first = piece.stop - piece.start, piece.row.position + piece.start
            tokens[i, :count] = piece.row.tokens[piece.start : piece.stop]
            positions[i, :count] = np.arange(first, first + count)
            tables[i, : len(piece.row.pages)] = piece.row.pages
            read[i] = count - 1
        return tokens, positions, tables, read


def _in_pages(cfg: CausalLMConfig, page_size: int, num_pages: int, int8: bool) -> CausalLMConfig:
    """The same model with a cache in pages, whose attention is computed by what suits this machine.

    A model may come with the kernels that suited the one that trained it.
    """

    def choose(node: Config) -> Config:
        return SelectKernelConfig() if node.PROVIDES == "attention_kernel" else node

    return paged(page_size=page_size, num_pages=num_pages, int8=int8)(transform(cfg, choose))


def page_bytes(cfg: CausalLMConfig, page_size: int, *, int8: bool = False) -> int:
    """What one page of the cache of a model takes, in all its layers."""
    cfg = _in_pages(cfg, page_size, 1, int8)
    definition, params = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(partial(_empty_cache, definition, page_size), params)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache) if a.dtype != jnp.int32)


def lower_step(cfg: CausalLMConfig, limits: Limits, form: Form, shape: tuple[int, int]) -> Lowered:
    """The program of a step for devices that need not be here.

    Args:
        cfg: of a trained model.
        limits: the sizes.
        form: of the model; it has a placement.
        shape: how many rows there are, and tokens a row.

    Raises:
        ShardingError: so many devices cannot share the model.
    """
    placement = form.placement
    assert placement is not None
    dtype, forms = jnp.dtype(cfg.activation_dtype.value), []
    _, trained = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))

    def formed(params: Params) -> Params:
        changed, params = form.of(cfg, jax.tree.map(lambda a: a.astype(dtype), params))
        forms.append(_in_pages(changed, limits.page_size, limits.num_pages, form.int8_cache))
        return params

    params = jax.eval_shape(formed, trained)
    model = nnx.eval_shape(lambda: forms[0].build(rngs=nnx.Rngs(0)))
    definition, _ = split(model)
    params = jax.tree.map(lambda info, a: _shape_of(placement, a, info.axes), parameter_infos(model), params)
    empty, step = _functions(definition, params, limits, placement)
    cache = map_cache(partial(_shape_of, placement), jax.eval_shape(empty, params))
    rows = jax.ShapeDtypeStruct(shape, jnp.int32)
    tables = jax.ShapeDtypeStruct((shape[0], _table_size(limits)), jnp.int32)
    read = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return Lowered(step.lower(params, cache, rows, rows, tables, read), params, cache)


def _functions(
    definition: nnx.GraphDef, params: Params, limits: Limits, placement: Placement | None
) -> tuple[Any, Any]:
    """What makes an empty cache of a model with these parameters, and what computes a step; see `_step`.

    The logits of a step lie on every device, as does all that it is given but parameters and cache.
    """
    empty = partial(_empty_cache, definition, _table_size(limits) * limits.page_size)
    step = partial(_step, definition, placement)
    if placement is None:
        return jax.jit(empty), jax.jit(step, donate_argnums=1, compiler_options=compiler_options())
    of_cache = map_cache(placement.sharding, jax.eval_shape(empty, params))
    options = compiler_options(placement.platform)
    to = placement.everywhere(), of_cache
    return (
        jax.jit(empty, out_shardings=of_cache),
        jax.jit(step, donate_argnums=1, out_shardings=to, compiler_options=options),
    )


def _shape_of(placement: Placement, array: Any, axes: Sequence[str | None]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement.sharding(array, axes))


def _table_size(limits: Limits) -> int:
    """Pages of the longest text."""
    return -(-limits.max_context // limits.page_size)


def _empty_cache(definition: nnx.GraphDef, max_len: int, params: Params) -> Cache:
    return merge(definition, params).init_cache(1, max_len)


def _step(
    definition: nnx.GraphDef,
    placement: Placement | None,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    tables: Int[Array, "R P"],
    read: Int[Array, " R"],
) -> tuple[Float[Array, "R V"], Cache]:
    model = merge(definition, params)
    with contextlib.nullcontext() if placement is None else placement.block():
        logits, cache = model.extend_at(tokens, positions, assign_pages(cache, tables), read)
    return logits, assign_pages(cache, tables[:1])  # as it came in, so that its memory is used again
