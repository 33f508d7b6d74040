"""Attention is compiled by the TPU's own compiler, which needs no TPU: libtpu compiles on any machine.

The test's target adds libtpu and sets what it asks of its surroundings.
"""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies

from pippin.core.module import merge, parameter_infos, split
from pippin.core.sharding import MeshConfig, use_mesh
from pippin.layers import configs
from pippin.layers.cache_paged import PagedState
from pippin.layers.context import Context

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or "TPU_ACCELERATOR_TYPE" not in os.environ,
    reason="needs libtpu and TPU_ACCELERATOR_TYPE=v5litepod-4, as its Bazel target has them",
)

_B = 8
_ATTENTION = configs.GroupedQueryAttentionConfig(input_dim=256, num_heads=4, num_kv_heads=2, head_dim=64)
_MESH = MeshConfig(data=1, fsdp=-1, tensor=2)


def _compiled(
    cfg: Any, topology: str, dtype: Any, mesh_config: MeshConfig = _MESH, length: int = 1024
) -> Any:
    """The gradient of a layer over packed documents, as a program for some TPUs."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = mesh_config.make(devices)

    def abstract(shape: Any, dtype: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_config.sharding(mesh, axes, shape))

    model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda info: abstract(info.shape, jnp.float32, info.axes), parameter_infos(model))
    definition, _ = split(model)

    def total(params: Any, x: Any, at: Any, segments: Any) -> Any:
        return jnp.sum(jnp.square(merge(definition, params)(x, Context(at, segments)).x.astype(jnp.float32)))

    tokens = abstract((_B, length), jnp.int32, ("batch", "sequence"))
    x = abstract((_B, length, cfg.input_dim), dtype, ("batch", "sequence", None))
    with use_mesh(mesh_config, mesh):
        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, x, tokens, tokens).compile()


@pytest.mark.parametrize(
    "fields, topology, dtype",
    [
        ({}, "v5e:2x2", jnp.bfloat16),
        ({"window": 300, "soft_cap": 30.0, "sinks": True}, "v5e:2x2", jnp.float32),
        ({"head_dim": 128}, "v5p:2x2x1", jnp.bfloat16),
    ],
    ids=["v5e", "v5e, all features", "v5p"],
)
def test_attention_trains_by_splash_on_tpus(fields, topology, dtype):
    program = _compiled(_ATTENTION.set(**fields), topology, dtype).as_text()
    for phase in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{phase}_segmented" in program, phase


def test_splash_needs_less_memory_than_blocks_of_logits():
    programs = [
        _compiled(_ATTENTION.set(kernel=kernel), "v5e:2x2", jnp.bfloat16, length=2048)
        for kernel in (configs.SplashKernelConfig(), configs.BlockwiseKernelConfig())
    ]
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, sequence=2), MeshConfig(data=1, sequence=4)], ids=["2", "4"]
)
@pytest.mark.parametrize(
    "fields", [{}, {"window": 300, "soft_cap": 30.0, "sinks": True}], ids=["plain", "all"]
)
def test_a_mesh_that_splits_sequences_is_compiled_to_a_ring(mesh, fields):
    program = _compiled(_ATTENTION.set(**fields), "v5e:2x2", jnp.bfloat16, mesh).as_text()
    assert "splash_mha" not in program and "collective-permute" in program


@pytest.mark.parametrize("schedule", configs.PipelineSchedule)
def test_a_pipeline_is_compiled_with_splash_in_its_stages(schedule):
    layer = configs.TransformerLayerConfig(
        attention=_ATTENTION, feed_forward=configs.FeedForwardConfig(hidden_dim=256)
    )
    pipeline = configs.PipelineConfig(schedule=schedule, microbatches=4, rounds=2)
    stack = configs.RepeatConfig(num_layers=4, layer=layer, pipeline=pipeline, remat=configs.Remat.FULL)
    cfg = configs.CausalLMConfig(
        vocab_size=512, dim=256, decoder=stack, activation_dtype=configs.FloatType.BFLOAT16
    )
    mesh_config = MeshConfig(data=1, pipeline=2, fsdp=2)
    mesh = mesh_config.make(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)

    def abstract(shape: Any, dtype: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_config.sharding(mesh, axes, shape))

    model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda i: abstract(i.shape, jnp.float32, i.axes), parameter_infos(model))
    definition, _ = split(model)
    names = ("tokens", "targets", "positions", "segment_ids", "loss_weights")
    kinds = [jnp.int32] * 4 + [jnp.float32]
    batch = {n: abstract((_B, 256), k, ("batch", "sequence")) for n, k in zip(names, kinds, strict=True)}
    with use_mesh(mesh_config, mesh):
        lowered = jax.jit(jax.grad(lambda p, b: merge(definition, p).loss(b)[0])).lower(params, batch)
    # Only 1F1B begins a loss in some ticks and not in others.
    assert ("stablehlo.case" in lowered.as_text()) == (schedule is configs.PipelineSchedule.ONE_F_ONE_B)
    program = lowered.compile().as_text()
    assert "splash_mha" in program and "collective-permute" in program


def _decoding(model: Any, topology: str, dtype: Any, new_tokens: int, page_size: int) -> Any:
    """A layer that reads a paged cache, and writes the next tokens into it, as a program for some TPUs."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh_config = MeshConfig(data=1, tensor=4)
    mesh = mesh_config.make(devices)
    cfg = configs.paged(page_size, num_pages=1024)(model)

    def abstract(a: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=mesh_config.sharding(mesh, axes, a.shape))

    built = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    infos, (definition, _) = parameter_infos(built), split(built)
    params = jax.tree.map(lambda i: abstract(jax.ShapeDtypeStruct(i.shape, jnp.float32), i.axes), infos)
    cache = jax.eval_shape(lambda: built.init_cache(_B, 2048, jnp.dtype(dtype)))
    everywhere = (None, None)
    cache = PagedState(
        abstract(cache.pages, (*everywhere, "kv_heads", None)), abstract(cache.tables, everywhere)
    )
    x = abstract(jax.ShapeDtypeStruct((_B, new_tokens, cfg.input_dim), dtype), (*everywhere, None))
    at = abstract(jax.ShapeDtypeStruct((_B, new_tokens), jnp.int32), everywhere)

    def extend(params: Any, x: Any, at: Any, cache: Any) -> Any:
        out = merge(definition, params)(x, Context(at), cache)
        return out.x, out.cache

    with use_mesh(mesh_config, mesh):
        return jax.jit(extend, donate_argnums=3).lower(params, x, at, cache).compile()


_WIDE = configs.GroupedQueryAttentionConfig(input_dim=256, num_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize(
    "fields, topology, dtype, new_tokens, page_size",
    [
        ({}, "v5e:2x2", jnp.bfloat16, 1, 16),
        ({"window": 300, "soft_cap": 30.0}, "v5e:2x2", jnp.bfloat16, 16, 16),
        ({}, "v5e:2x2", jnp.float32, 1, 16),
        ({"num_kv_heads": 16}, "v5p:2x2x1", jnp.bfloat16, 1, 64),
    ],
    ids=["v5e", "v5e, chunks", "v5e, float32", "v5p"],
)
def test_attention_decodes_from_pages_on_tpus(fields, topology, dtype, new_tokens, page_size):
    program = _decoding(_WIDE.set(**fields), topology, dtype, new_tokens, page_size)
    assert "ragged_paged_attention_kernel" in program.as_text()
    # The pages are changed where they lie: no second cache, and no copy of it in another order.
    of_pages = 1024 * page_size * 2 * fields.get("num_kv_heads", 8) * 128 * jnp.dtype(dtype).itemsize // 4
    assert program.memory_analysis().alias_size_in_bytes >= of_pages
    assert program.memory_analysis().temp_size_in_bytes < of_pages / 2
