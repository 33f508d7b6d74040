"""A stack of layers as a pipeline: each device holds some of the layers, and microbatches go from device to device.

With S devices and v rounds, the layers are S * v stages, and stage k is on device k % S: a microbatch goes round all
devices v times. Within a tick, every device computes one stage of one microbatch, forward, backward, or both.

- GPipe runs all microbatches forward; the backward pass is the reverse. A device keeps what it needs of all of them.
- 1F1B begins a microbatch's backward pass as soon as it has gone through all stages. A device keeps the inputs of at most
  2 S v - 1 stages, and computes each stage again on the way back. With v > 1 it is the interleaved 1F1B.

Both wait for (S - 1) / v of M microbatches' time.

Source: Huang et al. 2018, arXiv:1811.06965 (GPipe); Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (interleaved 1F1B).
"""

import dataclasses
import functools
import math
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
from pippin.layers.stack_config import PipelineConfig

Rows = Any  # a tree of arrays [B, ...], or split into microbatches, [M, B / M, ...]
# (parameters of a layer, x, the arrays of its context) -> (x, what the layer reports)
Layer = Callable[[Params, Array, Rows], tuple[Array, Outputs]]
# (parameters, [b, t, D], values of each token) -> (the loss, which adds up over tokens, and sums for the log)
Finish = Callable[[Any, Array, Any], tuple[Float[Array, ""], Any]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A stack of layers on the devices of the mesh in use."""

    axes: tuple[str, ...]  # of the mesh
    stages: int  # devices, S
    rounds: int  # v
    microbatches: int  # M
    layer: Layer

    @staticmethod
    def of(cfg: PipelineConfig, num_layers: int, batch: int, layer: Layer) -> "Pipeline":
        """The pipeline of a config on the mesh in use.

        Raises:
            ConfigError: the layers, the microbatches or the rows cannot be split so.
        """
        stages = num_shards("layers")
        if num_layers % (stages * cfg.rounds):
            raise ConfigError(
                f"Repeat: {num_layers} layers cannot be {stages * cfg.rounds} stages of one size ({stages} devices on the "
                f"pipeline axis, {cfg.rounds} rounds). Change pipeline.rounds, or the mesh's pipeline axis."
            )
        if cfg.microbatches % stages:
            raise ConfigError(
                f"Repeat: pipeline.microbatches ({cfg.microbatches}) must be a multiple of {stages}, the devices on the "
                "pipeline axis. Four for each device leave little waiting."
            )
        if batch % (cfg.microbatches * num_shards("batch")):
            raise ConfigError(
                f"Repeat: {batch} rows cannot be {cfg.microbatches} microbatches that {num_shards('batch')} devices share. "
                f"Make the batch a multiple of {cfg.microbatches * num_shards('batch')}, or pipeline.microbatches smaller."
            )
        return Pipeline(mesh_axes_of(shard_spec(("layers",))[0]), stages, cfg.rounds, cfg.microbatches, layer)

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
        divides = length % self.stages == 0
        out_specs = (self._spec(None, None, "layers", None) if divides else PartitionSpec(), PartitionSpec())
        run = on_shards(
            functools.partial(self._gpipe, scatter=divides),
            (self._spec("layers"), PartitionSpec(), PartitionSpec()),
            out_specs,
            over=self.axes,
        )
        out, outputs = run(params, self._split(x), self._split(ctx))
        return self._join(out), outputs

    def loss(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        ctx: Rows,
        finish: Finish,
        finish_params: Any,
        of_tokens: Any,
    ) -> tuple[Float[Array, ""], Any, Outputs]:
        """The sum of what `finish` makes of the result, plus the layers' own losses; by 1F1B where it is differentiated.

        Where it is, gradients are taken on the way: it is differentiable by `params`, `finish_params` and `x` alone.

        Args:
            params: of all layers, stacked.
            x: the input.
            ctx: the arrays of its context.
            finish: makes a loss of the last layer's result. All devices share in it: each gets some tokens.
            finish_params: what it is called with.
            of_tokens: what else it is called with: arrays [B, T].

        Raises:
            ConfigError: the tokens do not divide the devices.
        """
        if x.shape[1] % self.stages:
            raise ConfigError(
                f"Repeat: 1F1B shares {x.shape[1]} tokens of each row among {self.stages} devices, which does not divide "
                "them. Change input.sequence_length, or use pipeline.schedule=gpipe."
            )
        data = self._split((ctx, of_tokens))
        return _one_f_one_b(self, finish, params, finish_params, self._split(x), data)

    def _spec(self, *axes: str | None) -> PartitionSpec:
        return shard_spec(axes, over=self.axes)

    def _split(self, tree: Any) -> Any:
        """[B, ...] as [M, B / M, ...]; microbatch i has the rows i, i + M, ..., so that each device has its share."""
        count = self.microbatches
        return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), tree)

    def _join(self, x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    # All below runs on each device.

    def _stage(self, params: Params, x: Array, ctx: Rows) -> tuple[Array, Outputs]:
        x, outputs = jax.lax.scan(lambda x, p: self.layer(p, x, ctx), x, params)
        return x, jax.tree.map(lambda a: jnp.sum(a, axis=0), outputs)

    def _rounds_of(self, params: Params) -> Params:
        """The device's stages, [v, layers of a stage, ...], of its stretch of the stack: stages change devices if v > 1."""
        device = jax.lax.axis_index(self.axes)
        moves = _moves(self.stages, self.rounds)

        def exchange(a: Array) -> Array:
            blocks = a.reshape(self.rounds, -1, *a.shape[1:])
            if self.rounds == 1:
                return blocks
            got = jnp.zeros_like(blocks)
            for move in moves:
                block = _at(blocks, jnp.asarray(move.block, jnp.int32)[device])
                block = jax.lax.ppermute(block, self.axes, list(enumerate(move.to)))
                got = _put(got, jnp.asarray(move.round, jnp.int32)[device], block)
            return got

        return jax.tree.map(exchange, params)

    def _next(self, x: Array) -> Array:
        return jax.lax.ppermute(x, self.axes, [(i, (i + 1) % self.stages) for i in range(self.stages)])

    def _before(self, x: Array) -> Array:
        return jax.lax.ppermute(x, self.axes, [((i + 1) % self.stages, i) for i in range(self.stages)])

    def _item(self, turn: Int[Array, ""]) -> "_Item":
        """What a device computes in its n-th turn: S microbatches through its first stage, then its second, ..."""
        of_group = turn % (self.stages * self.rounds)
        return _Item(
            valid=(turn >= 0) & (turn < self.microbatches * self.rounds),
            microbatch=jnp.clip(
                turn // (self.stages * self.rounds) * self.stages + of_group % self.stages,
                0,
                self.microbatches - 1,
            ),
            round=of_group // self.stages,
        )

    def _tick(self, item: "_Item", device: Any) -> Int[Array, "*n"]:
        """When a device computes something forward."""
        group, i = item.microbatch // self.stages, item.microbatch % self.stages
        return group * self.stages * self.rounds + item.round * self.stages + i + device

    def _forward(
        self, rounds: Params, item: "_Item", arrived: Array, x: Array, ctx: Rows
    ) -> tuple[Array, tuple[Array, Outputs]]:
        """The input of a device's stage, and its result. The first stage takes a microbatch, all others what arrived."""
        first = (jax.lax.axis_index(self.axes) == 0) & (item.round == 0)
        into = jnp.where(first, _at(x, item.microbatch), arrived)
        return into, self._stage(_at(rounds, item.round), into, _at(ctx, item.microbatch))

    def _gpipe(self, params: Params, x: Array, ctx: Rows, *, scatter: bool) -> tuple[Array, Outputs]:
        rounds = self._rounds_of(params)
        device = jax.lax.axis_index(self.axes)

        def tick(arrived: Array, t: Array) -> Any:
            item = self._item(t - device)
            _, (out, outputs) = self._forward(rounds, item, arrived, x, ctx)
            return self._next(out), (out, _only_if(item.valid, outputs))

        count = self.microbatches * self.rounds + self.stages - 1
        _, (outs, outputs) = jax.lax.scan(tick, jnp.zeros_like(x[0]), jnp.arange(count, dtype=jnp.int32))
        last = self.stages - 1
        ends = _Item(True, jnp.arange(self.microbatches, dtype=jnp.int32), self.rounds - 1)
        outs = jnp.where(device == last, outs[self._tick(ends, last)], 0.0)
        if scatter:
            outs = jax.lax.psum_scatter(outs, self.axes, scatter_dimension=2, tiled=True)
        else:
            outs = jax.lax.psum(outs, self.axes)
        return outs, self._all_outputs(jax.tree.map(lambda a: jnp.sum(a, axis=0), outputs))

    def _all_outputs(self, outputs: Outputs) -> Outputs:
        """The reports of all devices: of losses, their mean over microbatches."""
        outputs = jax.lax.psum(outputs, self.axes)
        return dataclasses.replace(
            outputs, losses={name: value / self.microbatches for name, value in outputs.losses.items()}
        )

    def _finish(
        self, finish: Finish, params: Any, hidden: Array, of_tokens: Any
    ) -> tuple[Array, Any, Any, Array]:
        """The loss of the last device's `hidden`, sums for the log, and the gradients of both arguments.

        Each device does it for some tokens. The loss, the sums and the gradients of the parameters are of these.
        """
        device = jax.lax.axis_index(self.axes)
        last = jnp.where(device == self.stages - 1, hidden, 0.0)
        mine = jax.lax.psum_scatter(last, self.axes, scatter_dimension=1, tiled=True)
        size = mine.shape[1]
        of_mine = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, device * size, size, axis=1), of_tokens
        )
        loss, pull, sums = jax.vjp(lambda p, h: finish(p, h, of_mine), params, mine, has_aux=True)
        of_params, of_mine = pull(jnp.ones_like(loss))
        return loss, sums, of_params, jax.lax.all_gather(of_mine, self.axes, axis=1, tiled=True)

    def _one_f_one_b(
        self, finish: Finish, params: Params, finish_params: Any, x: Array, data: Any
    ) -> tuple[Any, Any]:
        """`((loss, sums, outputs), gradients of (params, finish_params, x))`."""
        ctx, of_tokens = data
        stages, rounds, count = self.stages, self.rounds, self.microbatches
        device = jax.lax.axis_index(self.axes)
        of_rounds, pull_rounds = jax.vjp(self._rounds_of, params)
        first_back = stages * rounds - 1  # the tick in which the first microbatch has gone through all stages
        kept = 2 * stages * rounds - 1

        def forward(carry: "_Carry", t: Array) -> tuple["_Carry", Array]:
            item = self._item(t - device)
            into, (out, outputs) = self._forward(of_rounds, item, carry.arrived, x, ctx)
            outputs = jax.tree.map(jnp.add, carry.outputs, _only_if(item.valid, outputs))
            inputs = _put(carry.inputs, t % kept, into)
            return carry._replace(arrived=self._next(out), inputs=inputs, outputs=outputs), out

        def meet(carry: "_Carry", t: Array, out: Array) -> tuple["_Carry", Array]:
            """The loss, in the ticks in which a microbatch has gone through all stages; and its gradient."""
            item = self._item(t - (stages - 1))  # of the last device: all know it

            def end(_: None) -> Any:
                return self._finish(finish, finish_params, out, _at(of_tokens, item.microbatch))

            shapes = jax.eval_shape(end, None)

            def skip(_: None) -> Any:
                return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            loss, sums, of_finish, of_out = jax.lax.cond(
                item.valid & (item.round == rounds - 1), end, skip, None
            )
            added = jax.tree.map(jnp.add, (carry.loss, carry.sums, carry.of_finish), (loss, sums, of_finish))
            return carry._replace(loss=added[0], sums=added[1], of_finish=added[2]), of_out

        def backward(carry: "_Carry", t: Array, of_out: Array) -> "_Carry":
            # Devices and rounds the other way round: the last device's last stage comes first.
            item = self._item(t - first_back - (stages - 1 - device))
            item = item._replace(round=rounds - 1 - item.round)
            into = _at(carry.inputs, self._tick(item, device) % kept)
            last = (device == stages - 1) & (item.round == rounds - 1)
            of_result = jnp.where(last, of_out, carry.returned)
            _, pull = jax.vjp(
                lambda p, x: self._stage(p, x, _at(ctx, item.microbatch)), _at(of_rounds, item.round), into
            )
            losses = {name: jnp.full_like(v, 1 / count) for name, v in carry.outputs.losses.items()}
            reports = dataclasses.replace(jax.tree.map(jnp.zeros_like, carry.outputs), losses=losses)
            of_params, of_into = pull((of_result, reports))
            old = _at(carry.of_rounds, item.round)
            new = jax.tree.map(jnp.add, old, _only_if(item.valid, of_params))
            first = item.valid & (device == 0) & (item.round == 0)
            of_x = jnp.where(first, of_into, _at(carry.of_x, item.microbatch))
            return carry._replace(
                returned=self._before(of_into),
                of_rounds=_put(carry.of_rounds, item.round, new),
                of_x=_put(carry.of_x, item.microbatch, of_x),
            )

        def tick(carry: "_Carry", t: Array, *, onward: bool, back: bool) -> tuple["_Carry", None]:
            out = x[0]
            if onward:
                carry, out = forward(carry, t)
            if back:
                of_out = jnp.zeros_like(out)
                if onward:
                    carry, of_out = meet(carry, t, out)
                carry = backward(carry, t, of_out)
            return carry, None

        carry = self._start(finish, of_rounds, finish_params, x, data, kept)
        both = count * rounds + stages - 1
        for start, stop, onward, back in (
            (0, first_back, True, False),
            (first_back, both, True, True),
            (both, both + first_back, False, True),
        ):
            ticks = jnp.arange(start, stop, dtype=jnp.int32)
            carry, _ = jax.lax.scan(functools.partial(tick, onward=onward, back=back), carry, ticks)
        outputs = self._all_outputs(carry.outputs)
        loss, sums, of_finish, of_x = jax.lax.psum(
            (carry.loss, carry.sums, carry.of_finish, carry.of_x), self.axes
        )
        (of_params,) = pull_rounds(carry.of_rounds)
        return (loss + outputs.total_loss().astype(loss.dtype), sums, outputs), (of_params, of_finish, of_x)

    def _start(
        self, finish: Finish, of_rounds: Params, finish_params: Any, x: Array, data: Any, kept: int
    ) -> "_Carry":
        ctx, of_tokens = data
        part = jax.tree.map(lambda a: a[0, :, : a.shape[2] // self.stages], of_tokens)
        hidden = x[0, :, : x.shape[2] // self.stages]
        outputs = jax.eval_shape(self._stage, _at(of_rounds, 0), x[0], _at(ctx, 0))[1]
        loss, sums = jax.eval_shape(finish, finish_params, hidden, part)

        def zeros(tree: Any) -> Any:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)

        return _Carry(
            arrived=jnp.zeros_like(x[0]),
            returned=jnp.zeros_like(x[0]),
            inputs=jnp.zeros((kept, *x.shape[1:]), x.dtype),
            outputs=zeros(outputs),
            loss=zeros(loss),
            sums=zeros(sums),
            of_rounds=zeros(of_rounds),
            of_finish=zeros(finish_params),
            of_x=jnp.zeros_like(x),
        )


class _Item(NamedTuple):
    """One stage of one microbatch, to be computed by a device."""

    valid: Any  # there is something to compute
    microbatch: Any
    round: Any


class _Carry(NamedTuple):
    """What a device keeps from tick to tick of 1F1B."""

    arrived: Array  # the input of its next stage forward
    returned: Array  # the gradient of the result of its next stage backward
    inputs: Array  # of the last ticks
    outputs: Outputs
    loss: Array
    sums: Any
    of_rounds: Params  # the gradients of its stages' parameters
    of_finish: Any
    of_x: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one_f_one_b(
    pipeline: Pipeline, finish: Finish, params: Params, finish_params: Any, x: Array, data: Any
) -> tuple[Array, Any, Outputs]:
    ctx, of_tokens = jax.tree.map(pipeline._join, data)
    out, outputs = pipeline(params, pipeline._join(x), ctx)
    loss, sums = finish(finish_params, out, of_tokens)
    return loss + outputs.total_loss().astype(loss.dtype), sums, outputs


def _forward_with_gradients(
    pipeline: Pipeline, finish: Finish, params: Params, finish_params: Any, x: Array, data: Any
) -> tuple[Any, Any]:
    whole, split = PartitionSpec(), pipeline._spec("layers")
    run = on_shards(
        functools.partial(pipeline._one_f_one_b, finish),
        (split, whole, whole, whole),
        (whole, (split, whole, whole)),
        over=pipeline.axes,
    )
    return run(params, finish_params, x, data)


def _scaled(pipeline: Pipeline, finish: Finish, gradients: Any, cotangent: Any) -> Any:
    scale = cotangent[0]
    return (*jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), None)


_one_f_one_b.defvjp(_forward_with_gradients, _scaled)


@dataclasses.dataclass(frozen=True)
class _Move:
    """A permutation of devices by which each sends one of its blocks of layers, and gets one."""

    block: tuple[int, ...]  # which of its own a device sends
    to: tuple[int, ...]
    round: tuple[int, ...]  # which stage of its a device gets


def _moves(stages: int, rounds: int) -> list[_Move]:
    """The moves that take block k of the layers, which device k // rounds holds, to device k % stages, as round k // stages."""
    common = math.gcd(stages, rounds)
    moves = []
    for i in range(rounds):
        # Devices whose blocks would go to the same place begin with another block.
        block = tuple((i + device * common // stages) % rounds for device in range(stages))
        sent = [device * rounds + block[device] for device in range(stages)]
        by_receiver = sorted(sent, key=lambda k: k % stages)
        moves.append(_Move(block, tuple(k % stages for k in sent), tuple(k // stages for k in by_receiver)))
    return moves


def _only_if(valid: Bool[Array, ""], tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.where(valid, a, jnp.zeros_like(a)), tree)


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _put(tree: Any, i: Any, value: Any) -> Any:
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), tree, value)
