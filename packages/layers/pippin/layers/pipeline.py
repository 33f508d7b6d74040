"""A stack of layers as a pipeline: each device holds some of the layers, and microbatches go from device to device.

With S devices and v rounds, the layers are S * v stages, and stage k is on device k % S: a microbatch goes round all
devices v times. Within a tick, every device computes one stage of one microbatch, forward, backward, or both.

- GPipe (`Pipeline`) runs all microbatches forward; the backward pass is the reverse. A device keeps its stages' inputs
  of all microbatches.
- 1F1B (`pipeline_1f1b`) begins a microbatch's backward pass as soon as it has gone through all stages. With v > 1 it is
  the interleaved 1F1B.

Both compute each stage again on the way back, and wait for (S - 1) / v of M microbatches' time.

Source: Huang et al. 2018, arXiv:1811.06965 (GPipe); Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (interleaved stages).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pippin.core.errors import ConfigError
from pippin.core.module import Params
from pippin.core.outputs import Outputs
from pippin.core.sharding import mesh_axes_of, num_shards, on_shards, shard_spec
from pippin.layers.indexing import item, with_item
from pippin.layers.pipeline_moves import moves
from pippin.layers.precision import at_least_float32
from pippin.layers.stack_config import PipelineConfig

Rows = Any  # a tree of arrays [B, ...], or split into microbatches, [M, B / M, ...]
# (parameters of a layer, x, the arrays of its context) -> (x, what the layer reports)
Layer = Callable[[Params, Array, Rows], tuple[Array, Outputs]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A stack of layers on the devices of the mesh in use."""

    axes: tuple[str, ...]  # of the mesh
    devices: int  # S
    rounds: int  # v
    microbatches: int  # M
    layer: Layer

    @staticmethod
    def of(cfg: PipelineConfig, num_layers: int, batch: int, layer: Layer) -> "Pipeline":
        """The pipeline of a config on the mesh in use.

        Raises:
            ConfigError: the layers, the microbatches or the rows cannot be split so.
        """
        devices = num_shards("layers")
        if num_layers % (devices * cfg.rounds):
            raise ConfigError(
                f"Repeat: {num_layers} layers cannot be {devices * cfg.rounds} stages of one size ({devices} devices on the "
                f"pipeline axis, {cfg.rounds} rounds). Change pipeline.rounds, or the mesh's pipeline axis."
            )
        if cfg.microbatches % devices:
            raise ConfigError(
                f"Repeat: pipeline.microbatches ({cfg.microbatches}) must be a multiple of {devices}, the devices on the "
                "pipeline axis. Four for each device leave little waiting."
            )
        if batch % (cfg.microbatches * num_shards("batch")):
            raise ConfigError(
                f"Repeat: {batch} rows cannot be {cfg.microbatches} microbatches that {num_shards('batch')} devices share: a "
                f"pipeline takes a multiple of {cfg.microbatches * num_shards('batch')} rows. To train, make "
                "pipeline.microbatches smaller, or give a step more rows: a larger batch, or fewer learner.microbatches. To "
                "evaluate, fill the batch up with rows of no weight, or set the decoder's pipeline to None: it has the same "
                "parameters, and takes any number of rows."
            )
        return Pipeline(
            mesh_axes_of(shard_spec(("layers",))[0]), devices, cfg.rounds, cfg.microbatches, layer
        )

    def __call__(
        self, params: Params, x: Float[Array, "B T D"], ctx: Rows
    ) -> tuple[Float[Array, "B T D"], Outputs]:
        """The result of all layers, split over the pipeline's devices by tokens where they divide them.

        Args:
            params: of all layers, stacked.
            x: the input.
            ctx: the arrays of its context.
        """
        length = x.shape[1]
        divides = length % self.devices == 0
        out_specs = (self.spec(None, None, "layers", None) if divides else PartitionSpec(), PartitionSpec())
        run = on_shards(
            functools.partial(self._gpipe, dtype=x.dtype, share=divides),
            (self.spec("layers"), PartitionSpec(), PartitionSpec()),
            out_specs,
            over=self.axes,
        )
        # The gradient of what all devices have is a sum over them.
        out, outputs = run(params, self.split(x.astype(at_least_float32(x.dtype))), self.split(ctx))
        return self.join(out), outputs

    def spec(self, *axes: str | None) -> PartitionSpec:
        """How the pipeline's devices share an array."""
        return shard_spec(axes, over=self.axes)

    def split(self, tree: Any) -> Any:
        """[B, ...] as [M, B / M, ...]; microbatch i has the rows i, i + M, ..., so that each device has its share."""
        count = self.microbatches
        return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), tree)

    def join(self, x: Array) -> Array:
        """What `split` was given, of one array."""
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    # All below runs on each device.

    def stage(self, params: Params, x: Array, ctx: Rows) -> tuple[Array, Outputs]:
        """The result and the reports of some layers."""
        x, outputs = jax.lax.scan(lambda x, p: self.layer(p, x, ctx), x, params)
        return x, jax.tree.map(lambda a: jnp.sum(a, axis=0), outputs)

    def rounds_of(self, params: Params) -> Params:
        """The device's stages, [v, layers of a stage, ...], of its stretch of the stack: stages change devices if v > 1."""
        device = jax.lax.axis_index(self.axes)

        def exchange(a: Array) -> Array:
            blocks = a.reshape(self.rounds, -1, *a.shape[1:])
            if self.rounds == 1:
                return blocks
            got = jnp.zeros_like(blocks)
            for move in moves(self.devices, self.rounds):
                block = item(blocks, jnp.asarray(move.block, jnp.int32)[device])
                block = jax.lax.ppermute(block, self.axes, list(enumerate(move.to)))
                got = with_item(got, jnp.asarray(move.round, jnp.int32)[device], block)
            return got

        return jax.tree.map(exchange, params)

    def next(self, x: Array) -> Array:
        """What the device before this one has."""
        return jax.lax.ppermute(x, self.axes, [(i, (i + 1) % self.devices) for i in range(self.devices)])

    def before(self, x: Array) -> Array:
        """What the next device has."""
        return jax.lax.ppermute(x, self.axes, [((i + 1) % self.devices, i) for i in range(self.devices)])

    def work(self, turn: Int[Array, ""]) -> "Work":
        """What a device computes in its n-th turn: S microbatches through its first stage, then its second, ..."""
        of_group = turn % (self.devices * self.rounds)
        return Work(
            valid=(turn >= 0) & (turn < self.microbatches * self.rounds),
            microbatch=jnp.clip(
                turn // (self.devices * self.rounds) * self.devices + of_group % self.devices,
                0,
                self.microbatches - 1,
            ),
            round=of_group // self.devices,
        )

    def tick(self, work: "Work", device: Any) -> Int[Array, "*n"]:
        """When a device computes something forward."""
        group, i = work.microbatch // self.devices, work.microbatch % self.devices
        return group * self.devices * self.rounds + work.round * self.devices + i + device

    def input(self, work: "Work", arrived: Array, x: Array) -> Array:
        """The input of a device's stage: the first stage takes a microbatch of `x`, all others what arrived."""
        first = (jax.lax.axis_index(self.axes) == 0) & (work.round == 0)
        return jnp.where(first, item(x, work.microbatch), arrived)

    def shared(self, x: Float[Array, "*b T D"]) -> Float[Array, "*b t D"]:
        """What the last device has, each device its share of the tokens."""
        parts = x.reshape(*x.shape[:-2], self.devices, -1, x.shape[-1])
        # Not a sum of zeros and it: that would round, and XLA's CPU compiler fails on sums of bfloat16 here.
        return jax.lax.all_to_all(jnp.moveaxis(parts, -3, 0), self.axes, 0, 0)[-1]

    def total(self, tree: Any) -> Any:
        """Sums over the devices, in float32 or wider."""
        return jax.tree.map(
            lambda a: jax.lax.psum(a.astype(at_least_float32(a.dtype)), self.axes).astype(a.dtype), tree
        )

    def _gpipe(
        self, params: Params, x: Array, ctx: Rows, *, dtype: Any, share: bool
    ) -> tuple[Array, Outputs]:
        rounds, x = self.rounds_of(params), x.astype(dtype)
        device = jax.lax.axis_index(self.axes)

        # All of a stage is computed again in the backward pass: what else a tick would keep has a copy of the stage's
        # parameters, which depend on the tick.
        @jax.checkpoint
        def stage(rounds: Params, index: Array, x: Array, ctx: Rows) -> tuple[Array, Outputs]:
            return self.stage(item(rounds, index), x, ctx)

        def tick(arrived: Array, t: Array) -> Any:
            work = self.work(t - device)
            into, of_rows = self.input(work, arrived, x), item(ctx, work.microbatch)
            out, outputs = stage(rounds, work.round, into, of_rows)
            return self.next(out), (out, only_if(work.valid, outputs))

        count = self.microbatches * self.rounds + self.devices - 1
        _, (outs, outputs) = jax.lax.scan(tick, jnp.zeros_like(x[0]), jnp.arange(count, dtype=jnp.int32))
        last = self.devices - 1
        ends = Work(True, jnp.arange(self.microbatches, dtype=jnp.int32), self.rounds - 1)
        outs = outs[self.tick(ends, last)]
        outs = self.shared(outs) if share else self.total(jnp.where(device == last, outs, 0.0))
        return outs, self.all_outputs(jax.tree.map(lambda a: jnp.sum(a, axis=0), outputs))

    def all_outputs(self, outputs: Outputs) -> Outputs:
        """The reports of all devices: of losses, their mean over microbatches."""
        outputs = self.total(outputs)
        return dataclasses.replace(
            outputs, losses={name: value / self.microbatches for name, value in outputs.losses.items()}
        )


class Work(NamedTuple):
    """One stage of one microbatch, to be computed by a device."""

    valid: Any  # there is something to compute
    microbatch: Any
    round: Any


def only_if(valid: Bool[Array, ""], tree: Any) -> Any:
    """The arrays, or zeros."""
    return jax.tree.map(lambda a: jnp.where(valid, a, jnp.zeros_like(a)), tree)
