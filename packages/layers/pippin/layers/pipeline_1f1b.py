"""1F1B: a pipeline in which a microbatch goes back as soon as it has gone through all stages.

In a tick, a device computes one stage of one microbatch forward, and one of another backward, which it first computes again from
its input. Ticks are loops in three parts, of which the first only goes forward and the last only back, so that no device
computes more than the schedule has it wait.

Beside the batch's input and its gradient, a device keeps the inputs of at most 2 S v - 1 stages of one microbatch.

Source: Narayanan et al. 2019, PipeDream, section 3.2 (1F1B); 2021, arXiv:2104.04473, section 2.2 (interleaved, and flushed each step).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pippin.core.errors import ConfigError
from pippin.core.module import Params
from pippin.core.outputs import Outputs
from pippin.core.sharding import on_shards
from pippin.layers.indexing import item, with_item
from pippin.layers.pipeline import Pipeline, Rows, only_if

# (parameters, [b, t, D], values of each token) -> (the loss, which adds up over tokens, and sums for the log)
Finish = Callable[[Any, Array, Any], tuple[Float[Array, ""], Any]]


def loss(
    pipeline: Pipeline,
    params: Params,
    x: Float[Array, "B T D"],
    ctx: Rows,
    finish: Finish,
    finish_params: Any,
    of_tokens: Any,
) -> tuple[Float[Array, ""], Any, Outputs]:
    """The sum of what `finish` makes of the result plus the layers' own losses; sums for the log; and the layers' reports.

    Where it is differentiated, gradients are taken on the way. Only the loss is differentiable, and by `params`,
    `finish_params` and `x` alone: of what among them it is differentiated by.

    Args:
        pipeline: the devices.
        params: of all layers, stacked.
        x: the input.
        ctx: the arrays of its context.
        finish: makes a loss of the last layer's result. All devices share in it: each gets some tokens.
        finish_params: what it is called with.
        of_tokens: what else it is called with: arrays [B, T].

    Raises:
        ConfigError: the tokens do not divide the devices.
    """
    if x.shape[1] % pipeline.devices:
        raise ConfigError(
            f"Repeat: 1F1B shares {x.shape[1]} tokens of each row among {pipeline.devices} devices, which does not divide "
            "them. Change input.sequence_length, or use pipeline.schedule=gpipe."
        )
    data = pipeline.split((ctx, of_tokens))
    return _loss(pipeline, finish, params, finish_params, pipeline.split(x), data)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    pipeline: Pipeline, finish: Finish, params: Params, finish_params: Any, x: Array, data: Any
) -> tuple[Array, Any, Outputs]:
    ctx, of_tokens = jax.tree.map(pipeline.join, data)
    out, outputs = pipeline(params, pipeline.join(x), ctx)
    total, sums = finish(finish_params, out, of_tokens)
    return total + outputs.total_loss().astype(total.dtype), sums, outputs


def _with_gradients(
    pipeline: Pipeline, finish: Finish, params: Params, finish_params: Any, x: Any, data: Any
) -> tuple[Any, Any]:
    """The result, and the gradients; None in place of those that nothing asks for, such as of frozen parameters."""
    whole, split = PartitionSpec(), pipeline.spec("layers")

    def run(params: tuple[Params, Params], finish_params: tuple[Any, Any], x: Array, data: Any) -> Any:
        rounds, pull = jax.vjp(pipeline.rounds_of, params[0])
        fixed = pipeline.rounds_of(params[1])
        device = _Device(pipeline, finish, rounds, fixed, *finish_params, x, by_x, *data)
        result, (of_rounds, *others) = device.run()
        return result, (*pull(of_rounds), *others)

    by_x = x.perturbed
    in_specs = (split, whole, whole, whole)
    return on_shards(run, in_specs, (whole, (split, whole, whole)), over=pipeline.axes)(
        _parted(params), _parted(finish_params), x.value, jax.tree.map(lambda p: p.value, data)
    )


def _parted(primals: Any) -> tuple[Any, Any]:
    """A tree of arrays as two, with None in place of what is in the other: those to differentiate by, and the rest."""
    return (
        jax.tree.map(lambda p: p.value if p.perturbed else None, primals),
        jax.tree.map(lambda p: None if p.perturbed else p.value, primals),
    )


def _whole(moving: Any, fixed: Any) -> Any:
    """What `_parted` was given."""
    return jax.tree.map(lambda m, f: f if m is None else m, moving, fixed, is_leaf=lambda leaf: leaf is None)


def _scaled(pipeline: Pipeline, finish: Finish, gradients: Any, cotangent: Any) -> Any:
    scale = cotangent[0]
    return (*jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), None)


_loss.defvjp(_with_gradients, _scaled, symbolic_zeros=True)


class _Carry(NamedTuple):
    """What a device keeps from tick to tick."""

    arrived: Array  # the input of its next stage forward
    returned: Array  # the gradient of the result of its next stage backward
    inputs: Array  # of the last ticks
    outputs: Outputs
    loss: Array
    sums: Any
    of_rounds: Params  # the gradients of its stages' parameters
    of_finish: Any
    of_x: Array | None  # None: nothing asks for it


@dataclasses.dataclass(frozen=True)
class _Device:
    """What each device has: its stages, and all microbatches [M, b, ...]."""

    pipeline: Pipeline
    finish: Finish
    rounds: Params  # to differentiate by; None in place of others
    fixed_rounds: Params  # these others
    finish_params: Any
    fixed_finish_params: Any
    x: Array
    by_x: bool  # whether to differentiate by x too
    ctx: Rows
    of_tokens: Any

    @property
    def index(self) -> Array:
        return jax.lax.axis_index(self.pipeline.axes)

    @property
    def first_back(self) -> int:
        """The tick in which the first microbatch has gone through all stages."""
        return self.pipeline.devices * self.pipeline.rounds - 1

    @property
    def kept(self) -> int:
        """For how many ticks a stage's input is needed at most."""
        return 2 * self.first_back + 1

    def run(self) -> tuple[Any, Any]:
        """`(loss, sums, outputs)`, and the gradients of the rounds, of the finish's parameters and of `x`."""
        p, carry = self.pipeline, self._start()
        turns = p.microbatches * p.rounds + p.devices - 1
        for start, stop, onward, back in (
            (0, self.first_back, True, False),
            (self.first_back, turns, True, True),
            (turns, turns + self.first_back, False, True),
        ):
            tick = functools.partial(self._tick, onward=onward, back=back)
            carry, _ = jax.lax.scan(tick, carry, jnp.arange(start, stop, dtype=jnp.int32))
        outputs = p.all_outputs(carry.outputs)
        total, sums, of_finish, of_x = p.total((carry.loss, carry.sums, carry.of_finish, carry.of_x))
        total += outputs.total_loss().astype(total.dtype)
        return (total, sums, outputs), (carry.of_rounds, of_finish, of_x)

    def _tick(self, carry: _Carry, t: Array, *, onward: bool, back: bool) -> tuple[_Carry, None]:
        out = of_out = jnp.zeros_like(self.x[0])
        if onward:
            carry, out = self._forward(carry, t)
        if onward and back:
            carry, of_out = self._end(carry, t, out)
        return (self._backward(carry, t, of_out) if back else carry), None

    def _forward(self, carry: _Carry, t: Array) -> tuple[_Carry, Array]:
        """One stage of one microbatch, and its result."""
        p = self.pipeline
        work = p.work(t - self.index)
        into = p.input(work, carry.arrived, self.x)
        params = _whole(item(self.rounds, work.round), item(self.fixed_rounds, work.round))
        out, outputs = p.stage(params, into, item(self.ctx, work.microbatch))
        outputs = jax.tree.map(jnp.add, carry.outputs, only_if(work.valid, outputs))
        inputs = with_item(carry.inputs, t % self.kept, into)
        return carry._replace(arrived=p.next(out), inputs=inputs, outputs=outputs), out

    def _end(self, carry: _Carry, t: Array, out: Array) -> tuple[_Carry, Array]:
        """The loss, in the ticks in which a microbatch has gone through all stages, and the gradient of its result."""
        p = self.pipeline
        work = p.work(t - (p.devices - 1))  # of the last device: all know it

        def end(out: Array) -> Any:
            return self._loss_of(out, item(self.of_tokens, work.microbatch))

        shapes = jax.eval_shape(end, out)

        def skip(out: Array) -> Any:
            return _zeros(shapes)

        ended = work.valid & (work.round == p.rounds - 1)
        *found, of_out = jax.lax.cond(ended, end, skip, out)
        total, sums, of_finish = jax.tree.map(
            jnp.add, (carry.loss, carry.sums, carry.of_finish), tuple(found)
        )
        return carry._replace(loss=total, sums=sums, of_finish=of_finish), of_out

    def _loss_of(self, out: Array, of_tokens: Any) -> tuple[Array, Any, Any, Array]:
        """The loss of the last device's result, sums for the log, and the gradients of the finish's parameters and of it.

        Each device does it for some tokens: all but the last gradient are of these.
        """
        p = self.pipeline
        mine = p.shared(out)
        size = mine.shape[1]
        of_mine = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, self.index * size, size, axis=1), of_tokens
        )
        total, pull, sums = jax.vjp(
            lambda params, hidden: self.finish(_whole(params, self.fixed_finish_params), hidden, of_mine),
            self.finish_params,
            mine,
            has_aux=True,
        )
        of_finish, of_hidden = pull(jnp.ones_like(total))
        return total, sums, of_finish, jax.lax.all_gather(of_hidden, p.axes, axis=1, tiled=True)

    def _backward(self, carry: _Carry, t: Array, of_out: Array) -> _Carry:
        """One stage of one microbatch, computed again, and the gradients of its parameters and of its input."""
        p = self.pipeline
        # Devices and rounds the other way round: the last device's last stage comes first.
        work = p.work(t - self.first_back - (p.devices - 1 - self.index))
        work = work._replace(round=p.rounds - 1 - work.round)
        into = item(carry.inputs, p.tick(work, self.index) % self.kept)
        last = (self.index == p.devices - 1) & (work.round == p.rounds - 1)
        of_rows = item(self.ctx, work.microbatch)
        fixed = item(self.fixed_rounds, work.round)
        _, pull = jax.vjp(
            lambda params, x: p.stage(_whole(params, fixed), x, of_rows), item(self.rounds, work.round), into
        )
        losses = {name: jnp.full_like(v, 1 / p.microbatches) for name, v in carry.outputs.losses.items()}
        reports = dataclasses.replace(_zeros(carry.outputs), losses=losses)
        of_params, of_into = pull((jnp.where(last, of_out, carry.returned), reports))
        new = jax.tree.map(jnp.add, item(carry.of_rounds, work.round), only_if(work.valid, of_params))
        of_x = carry.of_x
        if of_x is not None:
            first = work.valid & (self.index == 0) & (work.round == 0)
            of_x = with_item(of_x, work.microbatch, jnp.where(first, of_into, item(of_x, work.microbatch)))
        return carry._replace(
            returned=p.before(of_into), of_rounds=with_item(carry.of_rounds, work.round, new), of_x=of_x
        )

    def _start(self) -> _Carry:
        p = self.pipeline
        part = self.x.shape[2] // p.devices
        params = item(_whole(self.rounds, self.fixed_rounds), 0)
        _, outputs = jax.eval_shape(p.stage, params, self.x[0], item(self.ctx, 0))
        total, sums = jax.eval_shape(
            self.finish,
            _whole(self.finish_params, self.fixed_finish_params),
            self.x[0, :, :part],
            jax.tree.map(lambda a: a[0, :, :part], self.of_tokens),
        )
        return _Carry(
            arrived=jnp.zeros_like(self.x[0]),
            returned=jnp.zeros_like(self.x[0]),
            inputs=jnp.zeros((self.kept, *self.x.shape[1:]), self.x.dtype),
            outputs=_zeros(outputs),
            loss=_zeros(total),
            sums=_zeros(sums),
            of_rounds=_zeros(self.rounds),
            of_finish=_zeros(self.finish_params),
            of_x=jnp.zeros_like(self.x) if self.by_x else None,
        )


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
