"""A component that does not do what its interface says is found, and the message says why."""

from typing import Annotated, Any

import jax.numpy as jnp
import pytest
from flax import nnx

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.conformance import check_conformance, fill_required
from pippin.core.errors import ConfigError, PippinError, ShardingError
from pippin.core.module import Module, constant_init, parameter


class FeedForward(Module):
    """A right one, which the tests below spoil."""

    class Config(Config, provides="feed_forward"):
        input_dim: Required[int] = REQUIRED
        hidden_dim: Required[int] = REQUIRED

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        shape = (cfg.input_dim, cfg.hidden_dim)
        self.up = parameter(constant_init(1.0), rngs, shape, ("embed", "mlp"), fan_in=cfg.input_dim)
        self.down = parameter(constant_init(1.0), rngs, shape[::-1], ("mlp", "embed"), fan_in=cfg.hidden_dim)

    def __call__(self, x):
        return x @ self.up[...].astype(x.dtype) @ self.down[...].astype(x.dtype)


def component(base: type[Module] = FeedForward, **body: Any) -> Config:
    """A config of a component like another one, but for some methods."""
    config = type("Config", (base.Config,), {"__module__": __name__, "__qualname__": "Spoilt.Config"})
    cls = type(
        "Spoilt", (base,), {"__module__": __name__, "__qualname__": "Spoilt", "Config": config, **body}
    )
    return fill_required(cls.Config(), {"hidden_dim": 24})  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_right_component_passes(dtype: Any):
    check_conformance(component(), dtype=dtype)


def test_a_size_that_the_config_has_is_the_one_that_counts():
    check_conformance(component().set(input_dim=11))
    check_conformance(component(), sizes={"D": 13})


def _returns(change: Any) -> Any:
    return lambda self, x: change(FeedForward.__call__(self, x))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"__call__": _returns(lambda y: y[..., :-1])},
            r"\.__call__\(x=float32\[3, 5, 16\]\) returned y=float32\[3, 5, 15\]; .*'feed_forward' says "
            + r"float32\[B, T, D\], here \[3, 5, 16\]\. Return that, or provide another interface\.",
        ),
        ({"__call__": _returns(lambda y: y[0])}, r"returned y=float32\[5, 16\]; .* here \[3, 5, 16\]"),
        (
            {"__call__": _returns(lambda y: y.astype(jnp.int32))},
            r"returned y=int32\[3, 5, 16\]; .* says float32",
        ),
        ({"__call__": _returns(lambda y: None)}, r"returned y=None; .* says that it is never None"),
        (
            {"__call__": _returns(lambda y: (y, y))},
            r"returned y=\(float32\[3, 5, 16\], float32\[3, 5, 16\]\)",
        ),
        (
            {"__call__": lambda self, x: x @ self.down[...]},
            r"failed, though the interface 'feed_forward' has it so: TypeError: dot_general requires",
        ),
        (
            {"__call__": lambda self, inputs: inputs},
            r"whose method is __call__\(x\): .* takes no x and needs inputs",
        ),
        ({"__call__": lambda self, x, rate: x}, r"that of Spoilt needs rate\. Give it these arguments"),
    ],
)
def test_a_wrong_result_is_found(body: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check_conformance(component(**body))


def test_a_dtype_that_is_not_that_of_the_activations_is_found():
    wide = component(__call__=_returns(lambda y: y.astype(jnp.float32)))
    check_conformance(wide, dtype=jnp.float32)
    with pytest.raises(ConfigError, match=r"returned y=float32\[3, 5, 16\]; .* says bfloat16\[B, T, D\]"):
        check_conformance(wide, dtype=jnp.bfloat16)


def test_a_method_that_is_not_there_is_found():
    class Nothing(Module):
        class Config(FeedForward.Config):
            pass

        def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
            pass

    with pytest.raises(
        ConfigError, match=r"whose method is __call__\(x\): Nothing has no such method\. Add it"
    ):
        check_conformance(Nothing.Config(hidden_dim=2))


def test_arguments_of_the_constructor_that_holders_do_not_give_are_found():
    def init(self: Any, cfg: Any, *, rngs: nnx.Rngs, num_layers: int) -> None:
        FeedForward.__init__(self, cfg, rngs=rngs)

    with pytest.raises(
        ConfigError, match=r"Spoilt could not be built with rngs, as 'feed_forward' has it: .*num_layers"
    ):
        check_conformance(component(__init__=init))


def test_state_beside_the_parameters_is_found():
    def init(self: Any, cfg: Any, *, rngs: nnx.Rngs) -> None:
        FeedForward.__init__(self, cfg, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    with pytest.raises(ConfigError, match="holds state that is not a parameter: calls"):
        check_conformance(component(__init__=init))


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, ConfigError, "the parameter extra has no logical axes"),
        (
            {"axes": ("embed",)},
            ConfigError,
            r"the parameter extra of shape \(2, 3\) has the logical axes \('embed',\)",
        ),
        ({"axes": ("embed", "mpl")}, ShardingError, r"unknown logical axis 'mpl' \(did you mean 'mlp'\?\)"),
    ],
)
def test_parameters_without_known_logical_axes_are_found(
    metadata: dict[str, Any], error: type[Exception], message: str
):
    def init(self: Any, cfg: Any, *, rngs: nnx.Rngs) -> None:
        FeedForward.__init__(self, cfg, rngs=rngs)
        self.extra = nnx.Param(jnp.zeros((2, 3)), **metadata)

    with pytest.raises(error, match=message):
        check_conformance(component(__init__=init))


class Norm(Module):
    class Config(Config, provides="norm"):
        dim: Required[int] = REQUIRED

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        self.scale = parameter(constant_init(1.0), rngs, (cfg.dim,), (None,), fan_in=1)

    def __call__(self, x):
        return x * jnp.broadcast_to(self.scale[...], x.shape).astype(x.dtype)


def test_any_leading_dims_are_tried():
    check_conformance(component(Norm))

    def only_of_sequences(self: Any, x: Any) -> Any:
        _batch, _length, _dim = x.shape
        return x

    with pytest.raises(
        ConfigError, match=r"Spoilt\.__call__\(x=float32\[16\]\) failed, .*not enough values to unpack"
    ):
        check_conformance(component(Norm, __call__=only_of_sequences))


class Holder(FeedForward):
    """A feed-forward that holds another component."""

    class Config(FeedForward.Config):
        norm: Annotated[Config, Slot("norm")] = Norm.Config()

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.norm = cfg.norm.build(rngs=rngs)  # and does not set its dim


def test_what_a_holder_should_set_is_not_filled_in_for_it():
    cfg = fill_required(Holder.Config(), {"hidden_dim": 24, "dim": 16, "input_dim": 16})
    assert cfg.norm == Norm.Config()
    assert cfg.input_dim is REQUIRED
    with pytest.raises(ConfigError, match=r"norm\.dim of Holder\.Config is required and was not set"):
        check_conformance(cfg)


class Embedding(Module):
    class Config(Config, provides="embedding"):
        vocab_size: Required[int] = REQUIRED
        dim: Required[int] = REQUIRED

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.dim)
        self.weight = parameter(constant_init(1.0), rngs, shape, ("vocab", "embed"), fan_in=cfg.dim)

    def __call__(self, ids, dtype=jnp.float32):
        return self.weight[...][ids].astype(dtype)

    def attend(self, x):
        return x @ self.weight[...].T.astype(x.dtype)


def test_optional_inputs_are_given_and_left_out():
    check_conformance(component(Embedding), dtype=jnp.bfloat16)

    def needs_dtype(self: Any, ids: Any, dtype: Any) -> Any:
        return Embedding.__call__(self, ids, dtype)

    with pytest.raises(ConfigError, match=r"that of Spoilt does not work without dtype"):
        check_conformance(component(Embedding, __call__=needs_dtype))

    def refuses(self: Any, ids: Any, dtype: Any = None) -> Any:
        if dtype is None:
            raise PippinError("it got no dtype. Give it one.")
        return Embedding.__call__(self, ids, dtype)

    check_conformance(component(Embedding, __call__=refuses))


def test_a_method_cannot_refuse_what_its_interface_has():
    def refuses(self: Any, x: Any) -> Any:
        raise PippinError("it does not feel like it.")

    with pytest.raises(ConfigError, match="failed, though .* PippinError: it does not feel like it"):
        check_conformance(component(__call__=refuses))


class Schedule:
    def __init__(self, cfg: Any, total_steps: int):
        self.total_steps = total_steps

    def __call__(self, step):
        return step.astype(jnp.float32) / self.total_steps


class ScheduleConfig(Config, implementation=f"{__name__}:Schedule", provides="schedule"):
    pass


def test_what_a_component_is_built_with_is_given():
    check_conformance(ScheduleConfig(), values={"total_steps": 10})
    with pytest.raises(ConfigError, match=r"could not be built with total_steps.* give them in `values`"):
        check_conformance(ScheduleConfig())


class Optimizer:
    def __init__(self, cfg: Any, treatments: Any):
        pass

    def init(self, params):
        return {"count": jnp.zeros((), jnp.int32)}

    def update(self, grads, state, params, rate, schedule):
        return grads, {"count": state["count"].astype(jnp.float32)}


class OptimizerConfig(Config, implementation=f"{__name__}:Optimizer", provides="optimizer"):
    pass


def test_a_state_that_changes_its_dtype_is_found():
    tree = {"w": jnp.zeros((2,))}
    values = {"treatments": None, "params": tree, "grads": tree, "rate": 0.1}
    with pytest.raises(
        ConfigError,
        match=r"returned state=\{'count': float32\[\]\}; .* says that a state keeps .* here \{'count': int32\[\]\}",
    ):
        check_conformance(OptimizerConfig(), values=values)
    with pytest.raises(
        ConfigError, match="'optimizer' takes grads, which no method made. Give it in `values`"
    ):
        check_conformance(OptimizerConfig(), values={"treatments": None, "params": tree})
