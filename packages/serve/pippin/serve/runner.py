"""The runner: computes the tokens of a step with a model, in programs of a few fixed shapes."""

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from pippin.core.adapter import LowRank
from pippin.core.config import Config
from pippin.core.config_tree import transform
from pippin.core.errors import CheckpointError
from pippin.core.module import Params, flatten_params, merge, parameter_infos, split
from pippin.layers.cache_paged import assign_pages, map_cache
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.context import Cache
from pippin.layers.kernel_config import SelectKernelConfig
from pippin.layers.kernel_paged_config import paged
from pippin.layers.linear_multi_lora import adapter_shapes, assign_adapters, with_adapter
from pippin.serve.engine.request import Sampled, Sums
from pippin.serve.engine.scheduler import Limits, Row, doublings
from pippin.serve.errors import PreconditionError
from pippin.serve.form import Form
from pippin.serve.huge_pages import regions, use_huge_pages
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


class Shape(NamedTuple):
    """Of a program."""

    rows: int
    tokens: int  # of a row
    with_adapters: bool = False  # whether any row has one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Results:
    """What a program gives for each of its rows."""

    # Any: JAX takes it apart, and puts it together again of what stands for arrays.

    logits: Any  # [R, V], after its last token
    sums: Any  # [R, D], of the hidden states of its tokens; None: the program is for answers


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
            ConfigError: the model cannot have that form.
            ShardingError: so many devices cannot share the model.
        """
        self.limits, self.form, self._trained = limits, form, cfg
        cfg, params = form.of(cfg, params)
        cfg = _in_pages(cfg, limits.page_size, limits.num_pages, form.int8_cache)
        self._table_size = _table_size(limits)
        model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
        definition, _ = split(model)
        self._infos = parameter_infos(model)
        self._params = self._placed(params)
        self._empty, self._step = _functions(definition, self._params, limits, form.placement)
        self._programs: dict[Shape, jax.stages.Compiled] = {}  # shape -> program, once warmed up
        self._sampler = Sampler(cfg.vocab_size)
        self._cache: Cache = self._empty(self._params)

    def reset(self) -> None:
        """Makes the cache anew. What pages held is lost."""
        self._cache = None  # before the new one: two may not fit
        self._cache = self._empty(self._params)
        use_huge_pages(regions(jax.tree.leaves(self._cache)))

    def put_adapter(self, slot: int, maps: Mapping[str, LowRank]) -> None:
        """Makes some low-rank maps the adapter in a slot that no row has. Steps may be computed meanwhile.

        Args:
            slot: from 1.
            maps: by the path of a linear map, without stacks.

        Raises:
            CheckpointError: a map has other sizes than the model's.
        """
        shapes = adapter_shapes(self._params)
        for path, (down, up) in maps.items():
            if (got := (down.shape[0], up.shape[1])) != shapes.get(path):
                raise CheckpointError(
                    f"the adapter is for a linear map {path} of {got[0]} inputs and {got[1]} outputs; "
                    f"the model's has {shapes.get(path, 'no room for one')}."
                )
        changed = with_adapter(self._params, slot, maps)
        # Where they lay: the programs were compiled for that.
        self._params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), changed, self._params)

    def prepare(self, params: Mapping[str, Any]) -> Params:
        """Other parameters of the same model, as `exchange` takes them. Steps may be computed meanwhile.

        Raises:
            PreconditionError: they have other names, shapes or dtypes.
        """
        _, params = self.form.of(self._trained, params)
        new, old = flatten_params(params), flatten_params(self._params)
        different = sorted({n for n in {*new, *old} if _kind(new.get(n)) != _kind(old.get(n))})
        if different:
            name = different[0]
            raise PreconditionError(
                f"The weights are those of another model: {name} is {_kind(new.get(name))}, and "
                f"{_kind(old.get(name))} is served."
            )
        placed = self._placed(params)
        use_huge_pages(regions(jax.tree.leaves(placed)))
        return placed

    def exchange(self, prepared: Params) -> None:
        """Computes with other parameters from now on. What pages hold is of no use any more."""
        self._params = prepared

    def run(self, rows: Sequence[Row]) -> list[list[Sampled] | Sums]:
        """Computes a step; see `pippin.serve.engine.scheduler.Runner`."""
        computed = [(pieces, self._compute(pieces, shape)) for pieces, shape in self._split(rows)]
        sampled: dict[str, list[Sampled]] = {row.request_id: [] for row in rows}
        sums: dict[str, list[np.ndarray]] = {row.request_id: [] for row in rows if row.sums}
        for pieces, results in computed:
            asking = [piece.asking() for piece in pieces] + [None] * (results.logits.shape[0] - len(pieces))
            for row, result in zip(asking, self._sampler(results.logits, asking), strict=True):
                if row is not None and result is not None:
                    sampled[row.request_id].append(result)
            if results.sums is not None and any(piece.row.sums for piece in pieces):
                for piece, of_piece in zip(pieces, np.asarray(results.sums), strict=False):
                    if piece.row.sums:
                        sums[piece.row.request_id].append(of_piece)
        return [Sums(sums[row.request_id]) if row.sums else sampled[row.request_id] for row in rows]

    def shapes(self) -> list[Shape]:
        """Of all programs."""
        return [
            Shape(rows, tokens, with_adapters)
            for with_adapters in ([False] if self.form.room is None else [False, True])
            for counts, tokens in (
                (self.limits.answer_rows, 1),
                (self._chunk_counts(), self.limits.row_tokens),
            )
            for rows in counts
        ]

    def warm_up(self, told: Callable[[Shape, float], None] = lambda shape, seconds: None) -> None:
        """Compiles all programs, or gets them from JAX's cache of compiled programs, some at a time.

        Meanwhile the weights and the cache get huge pages, where this is a CPU.

        Args:
            told: gets each shape, and how many seconds it took.
        """

        def compiled(shape: Shape) -> tuple[float, jax.stages.Compiled]:
            start = time.monotonic()
            program = self._step.lower(self._params, cache, *self._inputs([], shape)).compile()
            return time.monotonic() - start, program

        # Not the arrays, which the first program to be run takes over.
        cache = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self._cache
        )
        # While one is traced, which takes Python's lock, others are compiled or read.
        with concurrent.futures.ThreadPoolExecutor(_COMPILING_THREADS + 1) as threads:
            paging = threads.submit(use_huge_pages, regions(jax.tree.leaves((self._params, self._cache))))
            for shape, (seconds, program) in zip(
                self.shapes(), threads.map(compiled, self.shapes()), strict=True
            ):
                self._programs[shape] = program
                self._sampler.warm_up(self._compute([], shape).logits)
                told(shape, seconds)
            paging.result()  # and its error, if there was one

    def _chunk_counts(self) -> list[int]:
        size = self.limits.row_tokens
        return doublings(-(-_LEAST_CHUNK_TOKENS // size), self.limits.chunk_tokens // size)

    def _split(self, rows: Sequence[Row]) -> Iterator[tuple[list[_Piece], Shape]]:
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
                with_adapters = any(piece.row.adapter_slot for piece in part)
                yield part, Shape(next(n for n in counts if n >= len(part)), tokens, with_adapters)

    def _compute(self, pieces: Sequence[_Piece], shape: Shape) -> "_Results":
        program: Any = self._programs.get(shape, self._step)
        results, self._cache = program(self._params, self._cache, *self._inputs(pieces, shape))
        # Those of the first device, where several have the same.
        return jax.tree.map(lambda a: a.addressable_data(0), results)

    def _placed(self, params: Params) -> Params:
        """Parameters in the form in which they are served, on the devices."""
        if self.form.placement is None:
            return jax.tree.map(jnp.asarray, params)
        return self.form.placement.place(self._infos, params)

    def _inputs(self, pieces: Sequence[_Piece], shape: Shape) -> tuple[np.ndarray, ...]:
        """The tokens, positions, tables of pages, places to read, and adapters of a program."""
        size = shape.rows, shape.tokens
        tokens, read = np.zeros(size, np.int32), np.zeros(shape.rows, np.int32)
        adapters = np.zeros(shape.rows, np.int32)
        positions = np.full(size, -1, np.int32)
        tables = np.full((shape.rows, self._table_size), -1, np.int32)
        for i, piece in enumerate(pieces):
            count, first = piece.stop - piece.start, piece.row.position + piece.start
            tokens[i, :count] = piece.row.tokens[piece.start : piece.stop]
            positions[i, :count] = np.arange(first, first + count)
            tables[i, : len(piece.row.pages)] = piece.row.pages
            read[i] = count - 1
            adapters[i] = piece.row.adapter_slot
        return tokens, positions, tables, read, adapters if shape.with_adapters else adapters[:0]


def _kind(array: Any) -> str:
    """Its dtype and shape, as text."""
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"


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


def lower_step(cfg: CausalLMConfig, limits: Limits, form: Form, shape: Shape) -> Lowered:
    """The program of a step for devices that need not be here.

    Args:
        cfg: of a trained model.
        limits: the sizes.
        form: of the model; it has a placement.
        shape: of the program.

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
    tokens, tables, read, adapters = (
        jax.ShapeDtypeStruct(size, jnp.int32)
        for size in (
            (shape.rows, shape.tokens),
            (shape.rows, _table_size(limits)),
            (shape.rows,),
            (shape.rows if shape.with_adapters else 0,),
        )
    )
    return Lowered(step.lower(params, cache, tokens, tokens, tables, read, adapters), params, cache)


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
    adapters: Int[Array, " A"],
) -> tuple[_Results, Cache]:
    model = merge(definition, assign_adapters(params, adapters))
    cache, sums = assign_pages(cache, tables), None
    with contextlib.nullcontext() if placement is None else placement.block():
        if tokens.shape[1] > 1:
            logits, sums, cache = model.extend_and_sum_at(tokens, positions, cache, read)
        else:
            logits, cache = model.extend_at(tokens, positions, cache, read)
    # The cache goes out as it came in, so that its memory is used again.
    return _Results(logits, sums), assign_pages(cache, tables[:1])
