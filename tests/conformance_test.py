"""Every registered component does what its interface says, and survives being stored.

A component is found by the module that declares its config; there is no list to keep.
"""

import contextlib
import dataclasses
import functools
import importlib
import subprocess
import sys
import typing
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.component import from_proto, from_text, to_proto, to_text
from pippin.core.config import Config, field_hints
from pippin.core.config_strategies import configs
from pippin.core.config_tree import override
from pippin.core.conformance import SIZES, check_conformance, fill_required
from pippin.core.errors import ConfigError
from pippin.core.interface import interface, interfaces, structure, structures
from pippin.core.mesh_config import LOGICAL_AXES
from pippin.core.module import flatten_params, parameter_infos, split, unflatten_params
from pippin.core.registry import import_configs, registry
from pippin.layers.attention import GroupedQueryAttention
from pippin.layers.cache import FullCache
from pippin.layers.context import LayerOutput
from pippin.layers.moe import Routes, TopKRouter
from pippin.train.learner.config import LearnerConfig
from pippin.train.learner.rules import resolve

_MODULES = set(import_configs())
TYPES = sorted(name for name, cls in registry().items() if cls.__module__ in _MODULES)
COMPONENTS = [name for name in TYPES if registry()[name].PROVIDES and registry()[name]._implementation]

# What a component leaves to whoever composes a model, by the field's name.
FIELDS: dict[str, Any] = {
    "dim": SIZES["D"],
    "hidden_dim": SIZES["F"],
    "num_heads": SIZES["N"],
    "num_kv_heads": SIZES["K"],
    "head_dim": SIZES["H"],
    "num_experts": SIZES["E"],
    "top_k": SIZES["k"],
    "num_layers": 2,
    "num_readers": 2,
    "num_tracks": 2,
    "learning_rate": 0.001,
}


# The fields, sizes and static inputs of a call that a component serves, where it serves some calls only.
SERVED: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, Any]]] = {
    "pippin.layers.FakeQuantLinear": ({"group_size": 1}, {}, {}),
    "pippin.layers.FakeQuantEmbedding": ({"group_size": 1}, {}, {}),
    "pippin.layers.SplashKernel": ({"interpret": True}, {"T": 128, "S": 128}, {"aligned": True}),
}

# What says a component that nothing on this machine can call; the arguments of its methods are compared.
REFUSED = {
    "pippin.layers.CuDNNKernel": "CuDNNKernel: it runs on NVIDIA GPUs, and this is a cpu",
    "pippin.layers.TritonKernel": "TritonKernel: it runs on NVIDIA GPUs, and this is a cpu",
    "pippin.layers.RingKernel": "RingKernel: no mesh splits the sequences",
    **{
        f"pippin.layers.{name}": f"{name}: keys are in no pages"
        for name in ("PagedBlockwiseKernel", "PagedTPUKernel", "PagedTritonKernel")
    },
}


def default(name: str) -> Config:
    return registry()[name]()


@functools.cache
def values() -> dict[str, Any]:
    """What the components of training are built with and called with: a tiny model's parameters, by shape."""
    cfg = fill_required(default("pippin.layers.CausalLM"), FIELDS).set(vocab_size=SIZES["V"])
    model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    infos, params = parameter_infos(model), split(model)[1]
    return {
        "infos": infos,
        "treatments": unflatten_params(resolve(LearnerConfig(learning_rate=0.001), infos)),
        "total_steps": 10,
        "params": params,
        "grads": params,
        "rate": 0.001,
        "parameter": lambda leaf, info: leaf,
        "other": lambda leaf: leaf,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_does_what_its_interface_says(name: str, dtype: Any):
    cfg = fill_required(default(name), FIELDS)
    if "activation_dtype" in field_hints(type(cfg)):
        cfg = override(cfg, {"activation_dtype": jnp.dtype(dtype).name})
    fields, sizes, statics = SERVED.get(name, ({}, {}, {}))
    refusal = REFUSED.get(name)
    with pytest.raises(ConfigError, match=refusal) if refusal else contextlib.nullcontext():
        check_conformance(cfg.set(**fields), dtype=dtype, sizes=sizes, values=values() | statics)


@pytest.mark.parametrize("name", interfaces())
def test_every_interface_has_a_component(name: str):
    assert any(registry()[c].PROVIDES == name for c in COMPONENTS)


@pytest.mark.parametrize("name", structures())
def test_a_structure_has_the_fields_of_its_python_class(name: str):
    described = structure(name)
    module, _, qualname = described.implementation.partition(":")
    cls = getattr(importlib.import_module(module), qualname)
    fields = (
        [f.name for f in dataclasses.fields(cls)]
        if dataclasses.is_dataclass(cls)
        else list(cls.__annotations__)
    )
    assert fields == [f.name for f in described.fields]


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_and_its_config_name_each_other(name: str):
    cls = registry()[name]
    assert cls.implementation().Config is cls


@pytest.mark.parametrize("name", TYPES)
def test_a_default_config_comes_back_equal_from_a_message_and_from_text(name: str):
    cfg = default(name)
    assert from_proto(to_proto(cfg)) == cfg
    assert from_text(to_text(cfg)) == cfg


# The checks of annotations look at a random item of a tuple.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TYPES).flatmap(lambda name: configs(registry()[name])))
def test_any_config_comes_back_equal_from_a_message_and_from_text(cfg: Config):
    message = to_proto(cfg)
    assert from_proto(message) == cfg
    assert from_text(to_text(cfg)) == cfg
    assert to_proto(from_text(to_text(cfg))) == message


@pytest.mark.parametrize(
    "name", [c for c in COMPONENTS if "rngs" in interface(registry()[c].PROVIDES).arguments]
)
def test_every_parameter_has_known_logical_axes(name: str):
    cfg = fill_required(default(name), FIELDS)
    sizes = {s.field: SIZES[s.symbol] for s in interface(cfg.PROVIDES).settings if s.symbol}
    fields, _, _ = SERVED.get(name, ({}, {}, {}))
    model = nnx.eval_shape(lambda: cfg.set(**fields).set(**sizes).build(rngs=nnx.Rngs(0)))
    infos = flatten_params(parameter_infos(model))
    assert flatten_params(split(model)[1]).keys() == infos.keys()
    for path, info in infos.items():
        assert len(info.axes) == len(info.shape), path
        assert set(info.axes) <= {*LOGICAL_AXES, None}, path


def test_importing_all_configs_needs_no_jax_and_takes_milliseconds():
    program = """
import sys, time
started = time.process_time()
from pippin.core.registry import import_configs
found = import_configs()
seconds = time.process_time() - started
heavy = {"jax", "flax", "optax", "numpy", "tensorflow", "seqio", "orbax"} & set(sys.modules)
print(round(1000 * seconds), len(found), sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    milliseconds, modules, heavy = done.stdout.split(maxsplit=2)
    assert heavy.strip() == "[]"
    assert int(modules) == len(_MODULES)
    print(f"the configs of all packages, {modules} modules, are imported in {milliseconds} ms of CPU time")
    assert int(milliseconds) < 2000


# That a wrong component is found, where structures and states are in play (the rest: pippin.core.conformance_test).


def spoilt(base: Any, **body: Any) -> Config:
    """A config of a component like another one, but for some methods."""
    names = {"__module__": __name__, "__qualname__": "Spoilt.Config"}
    config = type("Config", (base.Config,), names)
    cls = type(
        "Spoilt", (base,), {"__module__": __name__, "__qualname__": "Spoilt", "Config": config, **body}
    )
    return fill_required(typing.cast(Any, cls).Config(), FIELDS)


def _attends(change: Any) -> Any:
    def call(self: Any, x: Any, ctx: Any, cache: Any = None) -> Any:
        return change(GroupedQueryAttention.__call__(self, x, ctx, cache))

    return call


def _half_heads(kv: Any) -> Any:
    return dataclasses.replace(kv, k=kv.k[..., :4], v=kv.v[..., :4])


def _extends(change: Any) -> Any:
    def extend(self: Any, state: Any, k: Any, v: Any, positions: Any) -> Any:
        return change(*FullCache.extend(self, state, k, v, positions))

    return extend


@pytest.mark.parametrize(
    ("base", "body", "message"),
    [
        (
            GroupedQueryAttention,
            {"__call__": _attends(lambda o: o.x)},
            "returned out=float32.* says a LayerOutput",
        ),
        (
            GroupedQueryAttention,
            {"__call__": _attends(lambda o: LayerOutput(o.x[..., :3], o.cache, o.kv))},
            r"returned out\.x=float32\[3, 5, 3\]; .* says float32\[B, T, D\], here \[3, 5, 16\]",
        ),
        (
            GroupedQueryAttention,
            {"__call__": _attends(lambda o: LayerOutput(o.x, None if o.cache is None else (o.cache,), o.kv))},
            r"returned out\.cache=.* says that a state keeps its shapes and dtypes",
        ),
        (
            GroupedQueryAttention,
            {"__call__": _attends(lambda o: LayerOutput(o.x, o.cache, _half_heads(o.kv)))},
            r"returned out\.kv\.k=float32\[3, 5, 2, 4\]; .* says float32\[B, S, K, H\], here \[3, 5, 2, 8\]",
        ),
        (FullCache, {"extend": _extends(lambda state, kv: state)}, "extend.* says a tuple of state, kv"),
        (
            FullCache,
            {"extend": _extends(lambda state, kv: ({**state, "k": state["k"][:, :-1]}, kv))},
            r"returned state=.*'k': float32\[3, 6, 2, 8\].* here .*'k': float32\[3, 7, 2, 8\]",
        ),
        (
            TopKRouter,
            {"__call__": lambda self, x: Routes(*[TopKRouter.__call__(self, x).experts] * 2)},
            r"Routes|returned routes\.weights=int32",
        ),
    ],
)
def test_a_wrong_component_is_found(base: Any, body: dict[str, Any], message: str):
    check_conformance(spoilt(base))
    with pytest.raises(ConfigError, match=message):
        check_conformance(spoilt(base, **body))
