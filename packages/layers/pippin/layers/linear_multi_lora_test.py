"""Linear maps with many adapters: each row gets its own, and rows without one are as they were, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.adapter import LowRank
from pippin.core.errors import ConfigError
from pippin.core.module import Params, merge, split
from pippin.layers.linear_config import LinearConfig, MultiLoRALinearConfig
from pippin.layers.linear_multi_lora import assign_adapters, with_adapter
from pippin.layers.testing import normal

_CFG = MultiLoRALinearConfig(input_dim=12, output_dim=8, num_adapters=3, rank=4, base=LinearConfig(bias=True))
_X = normal(5, 3, 12, seed=1)
_MAPS = {i: LowRank(normal(12, r, seed=10 + i), normal(r, 8, seed=20 + i)) for i, r in ((1, 4), (3, 2))}


def _params() -> tuple[nnx.GraphDef, Params]:
    definition, params = split(_CFG.build(rngs=nnx.Rngs(0)))
    for index, maps in _MAPS.items():
        params = with_adapter(params, index, {"": maps})
    return definition, params


def test_each_row_gets_the_map_of_its_adapter():
    definition, params = _params()
    slots = [1, 0, 3, 2, 1]
    got = merge(definition, assign_adapters(params, jnp.asarray(slots, jnp.int32)))(
        jnp.asarray(_X, jnp.float32)
    )
    weight, bias = (np.asarray(params["base"][name], np.float64) for name in ("weight", "bias"))
    for row, slot in enumerate(slots):
        expected = _X[row] @ weight + bias
        if slot in _MAPS:
            expected += _X[row] @ _MAPS[slot].down @ _MAPS[slot].up
        # Sums of 12 products in float32.
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_whatever_adapters_others_have():
    definition, params = _params()
    x = jnp.asarray(_X, jnp.float32)

    @jax.jit
    def apply(slots: jax.Array) -> jax.Array:
        return merge(definition, assign_adapters(params, slots))(x)

    mixed, none, ones = (apply(jnp.asarray(s, jnp.int32)) for s in ([1, 0, 3, 2, 0], [0] * 5, [1] * 5))
    np.testing.assert_array_equal(mixed[0], ones[0])
    for row in (1, 3, 4):  # 2 is an adapter that was never loaded
        np.testing.assert_array_equal(mixed[row], none[row])
    base = merge(*split(_CFG.base.set(input_dim=12, output_dim=8).build(rngs=nnx.Rngs(0))))
    np.testing.assert_allclose(none, base(x), atol=1e-6)  # sums of 12 products, in another order


def test_an_adapter_that_is_replaced_leaves_nothing_behind():
    _, params = _params()
    smaller = LowRank(normal(12, 1, seed=5), normal(1, 8, seed=6))
    replaced = with_adapter(params, 1, {"": smaller})
    np.testing.assert_array_equal(replaced["down"][1, :, 1:], 0.0)
    np.testing.assert_array_equal(replaced["up"][1, 1:], 0.0)
    np.testing.assert_array_equal(replaced["down"][3], params["down"][3])
    np.testing.assert_array_equal(with_adapter(params, 1, {})["down"][1], 0.0)


def test_room_for_none_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        MultiLoRALinearConfig(num_adapters=0)
