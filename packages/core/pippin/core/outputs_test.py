"""What components report beside their result."""

import jax
import jax.numpy as jnp
import pytest

from pippin.core.errors import PippinError
from pippin.core.outputs import Outputs, add_collected, add_loss, add_metric, add_stacked, collect


def test_losses_add_up_and_metrics_are_averaged():
    with collect() as outputs:
        for value in (1.0, 3.0):
            add_loss("balance", jnp.float32(value))
            add_metric("share", jnp.float32(value))
    assert float(outputs.total_loss()) == 4.0
    assert {name: float(value) for name, value in outputs.means().items()} == {"share": 2.0, "balance": 4.0}


def test_nothing_is_kept_where_nobody_collects():
    add_loss("balance", jnp.float32(1.0))
    with collect() as outputs:
        pass
    assert outputs == Outputs()
    assert float(outputs.total_loss()) == 0.0


def test_the_innermost_block_gets_the_report_and_an_error_closes_it():
    with collect() as outer:
        with pytest.raises(RuntimeError), collect() as inner:
            add_loss("inner", jnp.float32(1.0))
            raise RuntimeError
        add_loss("outer", jnp.float32(2.0))
    assert (list(outer.losses), list(inner.losses)) == (["outer"], ["inner"])


def test_reports_are_kept_in_float32_or_wider():
    with collect() as outputs:
        for _ in range(300):  # in bfloat16 the sum would stop growing at 256
            add_loss("small", jnp.bfloat16(1.0))
    assert outputs.losses["small"].dtype == jnp.float32
    assert float(outputs.total_loss()) == 300.0
    with jax.enable_x64(True), collect() as wide:
        add_loss("wide", jnp.float64(1.0))
        assert wide.total_loss().dtype == jnp.float64


def test_a_report_that_is_no_scalar_is_refused():
    with (
        collect(),
        pytest.raises(PippinError, match=r"add_metric\('share'\) got an array of shape \(3,\): .* jnp\.mean"),
    ):
        add_metric("share", jnp.zeros(3))


def test_what_a_scan_and_a_checkpoint_collect_is_reported_outside_and_has_gradients():
    def layer(weight, x):
        with collect() as outputs:
            add_loss("square", jnp.square(weight))
            add_metric("weight", weight)
        return x * weight, outputs

    def loss(weights):
        with collect() as outputs:
            _, inner = jax.lax.scan(lambda x, weight: layer(weight, x), jnp.float32(1.0), weights)
            add_stacked(inner)
            add_collected(jax.checkpoint(layer)(weights[0], jnp.float32(1.0))[1])
        return outputs.total_loss(), outputs.means()

    weights = jnp.asarray([1.0, 2.0, 3.0])
    (total, means), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    assert float(total) == 15.0
    assert float(means["weight"]) == 1.75  # the mean of 1, 2, 3 and 1
    assert gradient.tolist() == [4.0, 4.0, 6.0]
