"""What the tests of layers share: modules with random float64 parameters, and gradient checks."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Jaxpr

from pippin.core.config import Config
from pippin.core.module import Params, merge, split

# Float64 against float64: room for a few hundred roundings, and far below any float32 step.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
# Float32 against float64, through some matrix products of small dims.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

assert_exact = partial(np.testing.assert_allclose, **EXACT)
assert_close = partial(np.testing.assert_allclose, **CLOSE)


def float64_fixture() -> Any:
    """A fixture that lets arrays be of float64 in all tests of the file that assigns it."""

    # Neither a generator, which the type checks of the tests hide from pytest, nor jax's context
    # manager, which a fixture would leave before the test starts.
    @pytest.fixture(autouse=True)
    def float64(request: pytest.FixtureRequest) -> None:
        jax.config.update("jax_enable_x64", True)
        request.addfinalizer(lambda: jax.config.update("jax_enable_x64", False))

    return float64


@dataclasses.dataclass(frozen=True)
class Parts:
    """A module apart: a pure, jitted function, and parameters none of which is as initialised."""

    definition: Any
    params: Params
    call: Callable[..., Any]  # (params, *args) -> what the module returns

    def method(self, name: str, **static: Any) -> Callable[..., Any]:
        """A method of the module as a pure, jitted function, with some arguments fixed."""
        return jax.jit(lambda params, *args: getattr(merge(self.definition, params), name)(*args, **static))


def parts(cfg: Config, *, dtype: Any = np.float64, seed: int = 0, **kwargs: Any) -> Parts:
    """The parts of a component that takes `rngs`. Zeros and ones that it starts with are moved away.

    Float64 needs `float64_fixture`.
    """
    definition, params = split(cfg.build(rngs=nnx.Rngs(0), **kwargs))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.3 * rng.standard_normal(a.shape), dtype), params
    )
    return Parts(definition, params, jax.jit(lambda params, *args: merge(definition, params)(*args)))


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    """Float64 values from N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape)


def positions(batch: int, length: int) -> np.ndarray:
    """0, 1, 2, ... in each row."""
    return np.tile(np.arange(length, dtype=np.int32), (batch, 1))


def check_gradients(f: Callable[..., Any], *args: Any) -> None:
    """Raises unless the gradient of `f`, in float64, is that of finite differences."""
    # The error of central differences with a step of 1e-6 is about 1e-10; third derivatives add to it.
    jax.test_util.check_grads(f, args, order=1, modes=("rev",), atol=1e-6, rtol=1e-6, eps=1e-6)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                yield from equations(inner)
