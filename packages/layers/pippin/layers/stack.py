"""The transformer layer, and the stacks that layers are put into.

Everything here provides the interface "layer": it maps [B, T, D] to [B, T, D]
in a context, with or without a cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.core.module import Module, Params, merge, parameter_infos, split
from pippin.core.outputs import Outputs, add_collected, add_stacked, collect
from pippin.core.sharding import constrain, num_shards
from pippin.layers import pipeline_1f1b
from pippin.layers.context import Cache, Context, LayerOutput
from pippin.layers.pipeline import Pipeline, Rows
from pippin.layers.pipeline_1f1b import Finish
from pippin.layers.stack_config import (
    ParallelTracksConfig,
    PipelineSchedule,
    Remat,
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)

_REMAT_POLICIES: dict[Remat, Any] = {
    Remat.FULL: jax.checkpoint_policies.nothing_saveable,
    Remat.SAVE_MATMULS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    Remat.OFFLOAD_MATMULS: jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class TransformerLayer(Module):
    """Computes `h = x + attention(norm(x))`, then `h + feed_forward(norm(h))`.

    Source: Xiong et al. 2020, arXiv:2002.04745, figure 1b (pre-norm).
    """

    Config = TransformerLayerConfig

    def __init__(self, cfg: TransformerLayerConfig, *, rngs: nnx.Rngs):
        self.attention_norm = cfg.norm.set(dim=cfg.input_dim).build(rngs=rngs)
        self.attention = cfg.attention.set(input_dim=cfg.input_dim).build(rngs=rngs)
        self.feed_forward_norm = cfg.norm.set(dim=cfg.input_dim).build(rngs=rngs)
        self.feed_forward = cfg.feed_forward.set(input_dim=cfg.input_dim).build(rngs=rngs)

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """An empty cache for positions below `max_len`."""
        return self.attention.init_cache(batch_size, max_len, dtype)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        attended = self.attention(self.attention_norm(x), ctx, cache)
        x = constrain(x + attended.x, "batch", "sequence", None)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return LayerOutput(constrain(x, "batch", "sequence", None), attended.cache, attended.kv)


class Sequence(Module):
    """Runs its layers in order. A layer that reads keys and values gets those of the last layer that made some."""

    Config = SequenceConfig

    def __init__(self, cfg: SequenceConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([c.set(input_dim=cfg.input_dim).build(rngs=rngs) for c in cfg.layers])

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of each layer."""
        return tuple(layer.init_cache(batch_size, max_len, dtype) for layer in self.layers)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        caches, kv = [], ctx.kv
        runs: dict[nnx.GraphDef, Run] = {}  # one for layers that are alike
        for i, layer in enumerate(self.layers):
            definition, params = split(layer)
            if definition not in runs:
                run = _collecting(definition)
                # Layers that are alike are traced once. What is computed at once needs no program.
                runs[definition] = jax.jit(run) if isinstance(x, Tracer) else run
            last_only = ctx.last_only and i == len(self.layers) - 1  # the layers before read every position
            of_layer = dataclasses.replace(ctx, kv=kv, last_only=last_only)
            out, outputs = runs[definition](params, x, of_layer, None if cache is None else cache[i])
            add_collected(outputs)
            x, kv = out.x, out.kv or kv
            caches.append(out.cache)
        return LayerOutput(x, None if cache is None else tuple(caches), kv)


class Repeat(Module):
    """Runs one layer n times by a scan over its stacked parameters: compile time does not grow with n.

    On a mesh that splits layers, with a config of a pipeline, its devices share the layers instead.
    """

    Config = RepeatConfig

    def __init__(self, cfg: RepeatConfig, *, rngs: nnx.Rngs):
        self.layer = _build_stacked(cfg.layer.set(input_dim=cfg.input_dim), cfg.num_layers, "layers", rngs)
        self.num_layers, self.remat, self.unroll = cfg.num_layers, cfg.remat, cfg.unroll
        self.pipeline = cfg.pipeline

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of each layer, stacked."""
        return _repeat_cache(self.layer.init_cache(batch_size, max_len, dtype), self.num_layers)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        run, params = _pure(self.layer, self.remat, in_loop=self.unroll < self.num_layers)
        ctx = dataclasses.replace(ctx, last_only=False)  # the next layer reads every position
        if cache is None and self.schedule is not None:
            x, outputs = self._pipeline(run, x, ctx)(params, x, jax.tree.leaves(ctx))
            add_collected(outputs)
            return LayerOutput(x, None)

        def body(x: Array, of_layer: Any) -> Any:
            params, cache = of_layer
            out, outputs = run(params, x, ctx, cache)
            return out.x, (out.cache, outputs)

        x, (cache, outputs) = jax.lax.scan(body, x, (params, cache), unroll=self.unroll)
        add_stacked(outputs)
        return LayerOutput(x, cache)

    @property
    def schedule(self) -> PipelineSchedule | None:
        """In which order the devices of the mesh in use share the layers; None where they do not."""
        return self.pipeline.schedule if self.pipeline is not None and num_shards("layers") > 1 else None

    def loss(
        self, x: Float[Array, "B T D"], ctx: Context, finish: Finish, finish_params: Any, of_tokens: Any
    ) -> tuple[Float[Array, ""], Any, Outputs]:
        """What `finish` makes of the result plus what layers report, sums for the log, and the reports.

        For 1F1B, which begins a microbatch's backward pass before others have gone forward: see `pipeline_1f1b.loss`.

        Raises:
            ConfigError: the layers, the rows or the tokens cannot be split so.
        """
        run, params = _pure(self.layer, self.remat, in_loop=True)
        pipeline = self._pipeline(run, x, ctx)
        return pipeline_1f1b.loss(pipeline, params, x, jax.tree.leaves(ctx), finish, finish_params, of_tokens)

    def _pipeline(self, run: "Run", x: Float[Array, "B T D"], ctx: Context) -> Pipeline:
        assert self.pipeline is not None
        of_ctx = jax.tree.structure(ctx)

        def layer(params: Params, x: Array, rows: Rows) -> tuple[Array, Outputs]:
            out, outputs = run(params, x, jax.tree.unflatten(of_ctx, rows), None)
            return out.x, outputs

        return Pipeline.of(self.pipeline, self.num_layers, x.shape[0], layer)


class SharedKVStack(Module):
    """Runs block 1, then block 2 on the keys and values of block 1's last layer.

    Where the caller reads the last position only, block 2, which has no cache to
    fill, computes that position alone: prefill costs block 1, and the result is [B, 1, D].

    Source: AFM 2025, arXiv:2507.13575, section 2.1.
    """

    Config = SharedKVStackConfig

    def __init__(self, cfg: SharedKVStackConfig, *, rngs: nnx.Rngs):
        dim = cfg.input_dim
        first = RepeatConfig(input_dim=dim, layer=cfg.layer, num_layers=cfg.num_layers - 1, remat=cfg.remat)
        readers = RepeatConfig(input_dim=dim, layer=cfg.reader, num_layers=cfg.num_readers, remat=cfg.remat)
        self.first = first.build(rngs=rngs)
        # Not in the scan: its keys and values come out.
        self.source = cfg.layer.set(input_dim=dim).build(rngs=rngs)
        self.readers = readers.build(rngs=rngs)
        self.remat = cfg.remat

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of block 1."""
        return tuple(m.init_cache(batch_size, max_len, dtype) for m in (self.first, self.source))

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        every = dataclasses.replace(ctx, last_only=False)
        first = self.first(x, every, None if cache is None else cache[0])
        run, params = _pure(self.source, self.remat, in_loop=False)
        source, outputs = run(params, first.x, every, None if cache is None else cache[1])
        add_collected(outputs)
        x, kv = source.x, source.kv
        if kv is None:
            raise ConfigError(
                "SharedKVStack: its layer gave no keys and values for the second block to read. Make it a "
                "TransformerLayer, or a Sequence with one, rather than a scanned stack."
            )
        if ctx.last_only:
            segments = None if ctx.segment_ids is None else ctx.segment_ids[:, -1:]
            x, ctx = x[:, -1:], Context(ctx.positions[:, -1:], segments, last_only=True)
            kv = dataclasses.replace(kv, aligned=False)
        x = self.readers(x, dataclasses.replace(ctx, kv=kv)).x
        return LayerOutput(x, None if cache is None else (first.cache, source.cache), kv)


class ParallelTracks(Module):
    """Runs each track on the same input, and averages their results.

    They run one after the other, each on all devices: the mesh splits a track's rows and weights as any layer's.

    Source: the server model of AFM 2025, arXiv:2507.13575, section 2.2 (PT); arXiv:2602.07306.
    """

    Config = ParallelTracksConfig

    def __init__(self, cfg: ParallelTracksConfig, *, rngs: nnx.Rngs):
        self.track = _build_stacked(cfg.layer.set(input_dim=cfg.input_dim), cfg.num_tracks, "tracks", rngs)
        self.num_tracks, self.remat = cfg.num_tracks, cfg.remat

    def init_cache(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of each track, stacked."""
        return _repeat_cache(self.track.init_cache(batch_size, max_len, dtype), self.num_tracks)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache = None) -> LayerOutput:
        run, params = _pure(self.track, self.remat, in_loop=True)
        infos = parameter_infos(self.track)

        def track(of_track: tuple[Params, Cache]) -> tuple[Array, Cache, Outputs]:
            # Else the compiler holds the gradients of all tracks whole on each device.
            params = jax.tree.map(lambda p, info: constrain(p, *info.last_axes(p.ndim)), of_track[0], infos)
            # Not the LayerOutput itself: stacked arrays do not have the shapes that it declares.
            out, outputs = run(params, x, ctx, of_track[1])
            return out.x, out.cache, outputs

        # Not a vmap: TPUs have no grouped matmuls with a batch, nor cuDNN a mask that is the same for a batch of calls.
        results, cache, outputs = jax.lax.map(track, (params, cache))
        add_stacked(outputs)
        return LayerOutput(jnp.mean(results, axis=0), cache)


Run = Callable[[Params, Array, Context, Cache], tuple[LayerOutput, Outputs]]


def _pure(layer: Module, remat: Remat, *, in_loop: bool) -> tuple[Run, Params]:
    """A layer as a function that returns what the layer reports too, and the layer's parameters.

    Args:
        layer: the layer.
        remat: what the function's backward pass computes again.
        in_loop: the function is the body of a loop. Elsewhere the compiler must be kept from
            merging what is computed again with what was computed before.
    """
    definition, params = split(layer)
    run = _collecting(definition)
    if remat is Remat.NONE:
        return run, params
    return jax.checkpoint(run, policy=_REMAT_POLICIES[remat], prevent_cse=not in_loop), params


def _collecting(definition: nnx.GraphDef) -> Run:
    """Layers of a definition as a function that returns what they report too."""

    def layer(params: Params, x: Array, ctx: Context, cache: Cache) -> tuple[LayerOutput, Outputs]:
        with collect() as outputs:
            out = merge(definition, params)(x, ctx, cache)
        return out, outputs

    return layer


def _build_stacked(cfg: Config, n: int, axis: str, rngs: nnx.Rngs) -> Any:
    """The module of a config with parameters of n, stacked on a first dim that has a logical axis of its own."""
    definition: Any = None

    def init(key: Array) -> Any:
        nonlocal definition
        definition, state = nnx.split(cfg.build(rngs=nnx.Rngs(params=key)))
        return state

    state = jax.vmap(init)(jax.random.split(rngs.params(), n))
    module = nnx.merge(definition, state)
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            node.set_metadata(axes=(axis, *node.get_metadata()["axes"]))
    return module


def _repeat_cache(cache: Cache, n: int) -> Cache:
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (n, *a.shape)), cache)
