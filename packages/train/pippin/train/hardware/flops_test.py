import jax
import jax.numpy as jnp
import pytest

from pippin.core.config import Config
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import SplashKernelConfig, TritonKernelConfig
from pippin.train.hardware.flops import function_flops


def test_matmuls_count_their_multiplications_and_additions() -> None:
    assert function_flops(lambda a, b: a @ b, jnp.ones((3, 4)), jnp.ones((4, 5))).total == 2 * 3 * 4 * 5
    batched = function_flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    )
    assert batched.total == 2 * 2 * 3 * 4 * 5


def test_a_loop_counts_as_often_as_it_turns() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]

    assert function_flops(loop, jnp.ones((3, 3))).total == 7 * 2 * 27


def test_the_dearest_branch_counts_and_what_is_computed_again_counts_again() -> None:
    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert function_flops(branch, jnp.ones((3, 3))).total == 2 * 2 * 27

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ x) @ x)(x))

    # Forward 2, backward 4, and one of the forward's again: its tanh is needed.
    assert function_flops(jax.grad(loss), jnp.ones((3, 3))).total >= 7 * 2 * 27 - 2 * 27


def test_grouped_matmuls_count_each_row_once() -> None:
    def grouped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, sizes)

    flops = function_flops(grouped, jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3]))
    assert flops.total == 2 * 6 * 4 * 5


@pytest.mark.parametrize(
    "cfg", [SplashKernelConfig(interpret=True), TritonKernelConfig(interpret=True, block_size=32)], ids=type
)
def test_a_kernel_counts_as_if_no_block_were_skipped(cfg: Config) -> None:
    kernel = cfg.build()
    positions = jnp.arange(128)[None]

    def attend(q: jax.Array, k: jax.Array) -> jax.Array:
        kv = KeyValues(k, k, positions, None, aligned=True)
        return kernel(q, kv, Context(positions), Logits(scale=1.0))

    flops = function_flops(attend, jnp.ones((1, 128, 2, 128)), jnp.ones((1, 128, 1, 128)))
    assert flops == (0.0, 2 * 2 * 2 * 128 * 128 * 128)  # for each of two heads, the logits and the values


def test_every_device_runs_what_is_inside_a_shard_map() -> None:
    spec, auto = jax.sharding.PartitionSpec, (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 4), ("rows", "columns"), axis_types=auto)

    def columns(a: jax.Array, b: jax.Array) -> jax.Array:
        inner = jax.shard_map(
            jnp.matmul,
            in_specs=(spec(), spec(None, "columns")),
            out_specs=spec(None, "columns"),
            axis_names={"columns"},
        )
        return inner(a, b) if nested else a @ b

    for nested in (False, True):  # noqa: B007  columns reads it
        split = jax.shard_map(
            columns, mesh=mesh, in_specs=(spec("rows"), spec()), out_specs=spec("rows"), axis_names={"rows"}
        )
        # However it is divided: the whole product.
        assert function_flops(split, jnp.ones((6, 4)), jnp.ones((4, 8))) == (2 * 6 * 4 * 8, 0.0)
