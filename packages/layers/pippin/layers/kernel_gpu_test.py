"""Attention is compiled by the compiler for NVIDIA GPUs, which needs no GPU: JAX's CUDA plugin compiles on any machine.

The programs that Triton makes are as the GPU runs them: blocks that its memory does not have are an error here.
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
from pippin.layers.context import Context, PagedKeyValues
from pippin.layers.kernel import Logits

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs JAX's CUDA plugin (4.9 GB)"
    ),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

_B, _T = 4, 256
_GPUS = {"NVIDIA H100 80GB HBM3": 9, "NVIDIA B200": 10}  # -> the major number of its architecture
_OPTIONS: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,  # nothing can be timed
    "xla_gpu_cudnn_deviceless_compilation_mode": "CUDNN_DEVICELESS_COMPILATION_DISABLED",
}


def _description(name: str) -> str:
    """XLA's `GpuTargetConfigProto` of a GPU, in text, with what an H100 and a B200 share."""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{name}"
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          name: "{name}"
          cuda_compute_capability {{ major: {_GPUS[name]} feature_extension: ACCELERATED_FEATURES }}
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          memory_bandwidth: 3350000000000 device_memory_size: 84942979072 l2_cache_size: 52428800
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
        }}
        """


def _mesh(gpu: str, count: int) -> tuple[MeshConfig, jax.sharding.Mesh]:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # JAX looks for a GPU and its libraries
    mesh_config = MeshConfig(data=1, fsdp=-1, tensor=min(count, 2))
    found = topologies.get_topology_desc(
        platform="cuda", target_config=_description(gpu), topology=f"1x1x{count}"
    )
    return mesh_config, mesh_config.make(found.devices)


def _compiled(cfg: Any, gpu: str, count: int, dtype: Any) -> Any:
    """The gradient of a layer over packed documents, as a program for some GPUs."""
    mesh_config, mesh = _mesh(gpu, count)

    def abstract(shape: Any, dtype: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_config.sharding(mesh, axes, shape))

    model = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda info: abstract(info.shape, jnp.float32, info.axes), parameter_infos(model))
    definition, _ = split(model)

    def total(params: Any, x: Any, at: Any, segments: Any) -> Any:
        return jnp.sum(jnp.square(merge(definition, params)(x, Context(at, segments)).x.astype(jnp.float32)))

    tokens = abstract((_B, _T), jnp.int32, ("batch", "sequence"))
    x = abstract((_B, _T, cfg.input_dim), dtype, ("batch", "sequence", None))
    with use_mesh(mesh_config, mesh):
        lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, x, tokens, tokens)
        return lowered.compile(compiler_options=_OPTIONS)


_WIDE = {"head_dim": 256, "soft_cap": 50.0, "sinks": True, "window": 100}


@pytest.mark.parametrize(
    "fields, gpu, count, dtype",
    [
        ({"head_dim": 256}, "NVIDIA H100 80GB HBM3", 1, jnp.bfloat16),
        (_WIDE, "NVIDIA H100 80GB HBM3", 4, jnp.float32),
        ({"head_dim": 64, "sinks": True}, "NVIDIA H100 80GB HBM3", 4, jnp.bfloat16),
        ({"head_dim": 96, "soft_cap": 50.0}, "NVIDIA H100 80GB HBM3", 1, jnp.float32),
        (_WIDE, "NVIDIA B200", 1, jnp.bfloat16),
        ({"head_dim": 128}, "NVIDIA B200", 4, jnp.float32),
    ],
)
def test_attention_trains_on_gpus_where_cudnn_refuses(fields, gpu, count, dtype):
    cfg = configs.GroupedQueryAttentionConfig(input_dim=128, num_heads=4, num_kv_heads=2).set(**fields)
    program = _compiled(cfg, gpu, count, dtype).as_text()
    assert program.count("__gpu$xla.gpu.triton") == 3  # forward, and the gradients of queries and of keys


@pytest.mark.parametrize(
    "head_dim, new_tokens, dtype, count",
    [
        (128, 1, jnp.bfloat16, 1),
        (256, 16, jnp.bfloat16, 2),
        (64, 1, jnp.float32, 1),
        (256, 4, jnp.float32, 1),
    ],
)
def test_attention_decodes_from_pages_on_gpus(head_dim, new_tokens, dtype, count):
    mesh_config, mesh = _mesh("NVIDIA H100 80GB HBM3", count)

    def abstract(shape: Any, dtype: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_config.sharding(mesh, axes, shape))

    q, new = (
        abstract((_B, new_tokens, n, head_dim), dtype, (None, None, axis, None))
        for n, axis in ((8, "heads"), (2, "kv_heads"))
    )
    pages = abstract((64, 16, 4, head_dim), dtype, (None, None, "kv_heads", None))
    at, tables = (abstract((_B, n), jnp.int32, (None, None)) for n in (new_tokens, 32))

    def attend(q: Any, new: Any, at: Any, pages: Any, tables: Any) -> Any:
        kv = PagedKeyValues(new, new, at, None, False, pages, tables)
        kernel = configs.SelectKernelConfig(kernels=configs.PAGED_KERNELS).build()
        return kernel(q, kv, Context(at), Logits(0.1, 300, 30.0, None, jnp.ones(8)))

    with use_mesh(mesh_config, mesh):
        program = jax.jit(attend).lower(q, new, at, pages, tables).compile(compiler_options=_OPTIONS)
    assert program.as_text().count("__gpu$xla.gpu.triton") == 1
