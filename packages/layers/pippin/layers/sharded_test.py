"""Models on a mesh of four devices compute what they compute on one, and split what they should.

The test's target sets XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import replace
from pippin.core.module import merge, parameter_infos
from pippin.core.sharding import MeshConfig, use_mesh
from pippin.layers import configs
from pippin.layers.context import Context, KeyValues, PagedKeyValues
from pippin.layers.kernel import Logits, attention_shape
from pippin.layers.testing import assert_close, normal, parts, positions

pytestmark = pytest.mark.skipif(
    jax.device_count() < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4"
)

_V, _B, _T = 24, 4, 8
_LAYER = configs.TransformerLayerConfig(
    attention=configs.GroupedQueryAttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=configs.RMSNormConfig()
    ),
    feed_forward=configs.FeedForwardConfig(hidden_dim=12),
)
_LM = configs.CausalLMConfig(
    vocab_size=_V,
    dim=8,
    decoder=configs.RepeatConfig(layer=_LAYER, num_layers=2),
    loss_chunk_tokens=8,
)
_MOE = replace(_LM, configs.FeedForwardConfig, configs.MoEConfig(num_experts=4))

_TOKENS = np.random.default_rng(0).integers(0, _V, (_B, _T)).astype(np.int32)
_BATCH = {
    "tokens": _TOKENS,
    "targets": np.roll(_TOKENS, -1, axis=1),
    "positions": positions(_B, _T),
    "segment_ids": np.ones((_B, _T), np.int32),
    "loss_weights": np.ones((_B, _T), np.float32),
}

MESHES = {
    "data": MeshConfig(),
    "fsdp and tensor": MeshConfig(data=1, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, sequence=2),
    "expert": MeshConfig(data=1, expert=4),
    "expert and tensor": MeshConfig(data=1, expert=2, tensor=2),
    "expert and sequence": MeshConfig(data=1, expert=2, sequence=2),
}


def _lowered(cfg: configs.CausalLMConfig, mesh_config: MeshConfig) -> tuple[Any, Any, Any]:
    """A compiled step on the mesh, and the parameters and the batch on it."""
    m = parts(cfg, dtype=jnp.float32)
    mesh = mesh_config.make(jax.devices()[:4])

    def on_mesh(value: Any, axes: Any) -> Any:
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, mesh_config.spec(axes)))

    infos = parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda info, value: on_mesh(value, info.axes), infos, m.params)
    batch = {name: on_mesh(value, ("batch", "sequence")) for name, value in _BATCH.items()}
    step = jax.jit(jax.value_and_grad(lambda p, b: merge(m.definition, p).loss(b)[0]))
    with use_mesh(mesh_config, mesh):
        return step.lower(params, batch).compile(), params, batch


@pytest.mark.parametrize(
    "cfg, mesh",
    [(_LM, "data"), (_LM, "fsdp and tensor"), (_LM, "sequence"), (_MOE, "data"), (_MOE, "expert")]
    + [(_MOE, "expert and tensor"), (_MOE, "expert and sequence")],
)
def test_a_mesh_changes_no_number(cfg, mesh):
    step, params, batch = _lowered(cfg, MESHES[mesh])
    one = parts(cfg, dtype=jnp.float32)
    alone = jax.jit(jax.value_and_grad(lambda p, b: merge(one.definition, p).loss(b)[0]))
    jax.tree.map(assert_close, step(params, batch), alone(one.params, _BATCH))


@pytest.mark.parametrize("mesh", ["data", "fsdp and tensor"])
@pytest.mark.parametrize(
    "cfg", [configs.SplashKernelConfig(interpret=True), configs.TritonKernelConfig(interpret=True)], ids=type
)
def test_a_kernel_runs_on_each_devices_sequences_and_heads(cfg, mesh):
    kernel = cfg.build()
    q, k, v = (jnp.asarray(normal(_B, 128, n, 8, seed=n), jnp.float32) for n in (4, 2, 2))
    at, segments = positions(_B, 128), np.repeat(np.array([[1, 2]] * _B, np.int32), [50, 78], axis=1)

    # A new function each time: a mesh is no argument, and jit would return the program of the other.
    def gradients() -> Any:
        def total(q, k, v, sinks):
            kv = KeyValues(k, v, jnp.asarray(at), jnp.asarray(segments), aligned=True)
            out = kernel(
                q,
                kv,
                Context(kv.positions, kv.segment_ids),
                Logits(0.3, window=60, soft_cap=3.0, sinks=sinks),
            )
            return jnp.sum(jnp.square(out))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))

    args = (q, k, v, jnp.ones(4))
    alone = gradients()(*args)
    with use_mesh(MESHES[mesh], MESHES[mesh].make(jax.devices()[:4])):
        compiled = gradients().lower(*args).compile()
    jax.tree.map(assert_close, compiled(*args), alone)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize(
    "cfg",
    [configs.PagedTritonKernelConfig(interpret=True), configs.PagedBlockwiseKernelConfig()],
    ids=type,
)
def test_a_paged_cache_is_split_by_heads(cfg):
    mesh_config = MeshConfig(data=2, tensor=2)
    q, new, pages = (
        jnp.asarray(normal(*shape, seed=i), jnp.float32)
        for i, shape in enumerate(((3, 2, 4, 16), (3, 2, 2, 16), (5, 4, 4, 16)))
    )
    at = jnp.asarray([[6, 7], [0, -1], [2, 3]], jnp.int32)
    tables = jnp.asarray([[4, 1], [0, -1], [4, -1]], jnp.int32)

    def attend() -> Any:
        def run(q, pages):
            kv = PagedKeyValues(new, new, at, None, False, pages, tables)
            return cfg.build()(q, kv, Context(at), Logits(0.3, 5, 3.0, None, jnp.arange(4.0)))

        return jax.jit(run)

    alone = attend()(q, pages)
    mesh = mesh_config.make(jax.devices()[:4])
    with use_mesh(mesh_config, mesh):
        q, pages = (
            jax.device_put(a, mesh_config.sharding(mesh, (None, None, axis, None), a.shape))
            for a, axis in ((q, "heads"), (pages, "kv_heads"))
        )
        compiled = attend().lower(q, pages).compile()
    assert_close(compiled(q, pages), alone)
    assert not re.search(r"f32\[5,4,4,16\]\S* all-gather", compiled.as_text())


def test_splash_attention_is_not_chosen_where_the_mesh_splits_sequences():
    mesh = MESHES["sequence"]
    q = jnp.zeros((_B, 128, 4, 8))
    kv = KeyValues(q, q, jnp.asarray(positions(_B, 128)), None, aligned=True)
    with use_mesh(mesh, mesh.make(jax.devices()[:4])):
        shape = attention_shape(q, kv, Context(kv.positions), Logits(1.0))
    assert "which RingKernel is for" in configs.SplashKernelConfig(interpret=True).supports(shape)


def test_splash_attention_is_not_chosen_where_the_mesh_splits_queries_and_not_their_keys():
    rules = tuple(rule for rule in MeshConfig().rules if rule.logical != "kv_heads")
    mesh = MeshConfig(data=2, tensor=2, rules=rules)
    q, k = jnp.zeros((_B, 128, 4, 8)), jnp.zeros((_B, 128, 2, 8))
    kv = KeyValues(k, k, jnp.asarray(positions(_B, 128)), None, aligned=True)
    with use_mesh(mesh, mesh.make(jax.devices()[:4])):
        shape = attention_shape(q, kv, Context(kv.positions), Logits(1.0))
    assert "query heads 2 ways and key heads 1 ways" in configs.SplashKernelConfig(interpret=True).supports(
        shape
    )


def test_tokens_go_to_their_experts_and_no_expert_to_the_tokens():
    step, _, _ = _lowered(_MOE, MESHES["expert"])
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", step.as_text())
    # Of 32 tokens of 8 numbers on 4 devices, and experts of 8 x 32 numbers that stay where they are.
    assert gathered and not [shape for shape in gathered if shape.startswith("4,")]


def _logits(program: str) -> set[int]:
    """How many tokens the float arrays over the vocabulary hold, of what each device computes."""
    shapes = re.findall(rf"f32\[([\d,]*,{_V})\]", program)
    return {int(np.prod([int(n) for n in shape.split(",")])) // _V for shape in shapes}


@pytest.mark.parametrize("mesh", ["data", "sequence"])
def test_each_device_computes_its_share_of_every_chunk_of_the_loss(mesh):
    step, _, _ = _lowered(_LM.set(dim=16, loss_chunk_tokens=2), MESHES[mesh])
    # Two tokens at a time on each of four devices: a chunk has eight.
    assert 2 in _logits(step.as_text())
    assert not {8, _B * _T} & _logits(step.as_text())
