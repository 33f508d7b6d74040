import jax
import jax.numpy as jnp

from pippin.train.hardware.flops import function_flops


def test_matmuls_count_their_multiplications_and_additions() -> None:
    assert function_flops(lambda a, b: a @ b, jnp.ones((3, 4)), jnp.ones((4, 5))) == 2 * 3 * 4 * 5
    batched = function_flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    )
    assert batched == 2 * 2 * 3 * 4 * 5


def test_a_loop_counts_as_often_as_it_turns() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]

    assert function_flops(loop, jnp.ones((3, 3))) == 7 * 2 * 27


def test_the_dearest_branch_counts_and_what_is_computed_again_counts_again() -> None:
    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert function_flops(branch, jnp.ones((3, 3))) == 2 * 2 * 27

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ x) @ x)(x))

    # Forward 2, backward 4, and one of the forward's again: its tanh is needed.
    assert function_flops(jax.grad(loss), jnp.ones((3, 3))) >= 7 * 2 * 27 - 2 * 27


def test_grouped_matmuls_count_each_row_once() -> None:
    def grouped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, sizes)

    flops = function_flops(grouped, jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3]))
    assert flops == 2 * 6 * 4 * 5
