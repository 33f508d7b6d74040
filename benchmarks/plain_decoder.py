"""A training step as one would write it by hand in JAX: a Llama, no framework. What ours is compared with.

The same shape, sharding, remat, splash kernel, packed batch and AdamW as ours; the loss is that of all logits at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

_HEAD_DIM = 128
_EPS = 1e-5
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A Llama with as many key heads as query heads and a head of its own, on a batch."""

    num_layers: int
    dim: int
    num_heads: int
    hidden_dim: int
    vocab_size: int
    batch_size: int
    sequence_length: int


def compile_step(shape: Decoder, devices: Sequence[Any], options: Mapping[str, Any]) -> jax.stages.Compiled:
    """The step, compiled for some devices: state split over all of them, as FSDP does."""
    mesh = jax.make_mesh((len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1)
    )

    def placed(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = {
        name: placed(jax.ShapeDtypeStruct(s, jnp.float32), spec)
        for name, (s, spec) in _parameters(shape).items()
    }
    moments = jax.tree.map(
        lambda x: placed(x, next((p.sharding.spec for p in params.values() if p.shape == x.shape), P())),
        jax.eval_shape(optimizer.init, params),
    )
    ids = placed(jax.ShapeDtypeStruct((shape.batch_size, shape.sequence_length), jnp.int32), P("fsdp"))
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["loss_weights"] = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding)

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: _loss(p, batch, shape, mesh))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    out = jax.tree.map(lambda x: x.sharding, (params, moments))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out, None))
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        lowered = jitted.lower(params, moments, batch)
    return lowered.compile(compiler_options=dict(options))


def _parameters(shape: Decoder) -> dict[str, tuple[tuple[int, ...], P]]:
    """Each parameter's shape and partition: the model dim is split."""
    layers, d, f, heads = shape.num_layers, shape.dim, shape.hidden_dim, shape.num_heads * _HEAD_DIM
    into, out_of = P(None, "fsdp", None), P(None, None, "fsdp")
    return {
        "embedding": ((shape.vocab_size, d), P(None, "fsdp")),
        "attention_norm": ((layers, d), P(None, "fsdp")),
        "query": ((layers, d, heads), into),
        "key": ((layers, d, heads), into),
        "value": ((layers, d, heads), into),
        "output": ((layers, heads, d), out_of),
        "ffn_norm": ((layers, d), P(None, "fsdp")),
        "gate": ((layers, d, f), into),
        "up": ((layers, d, f), into),
        "down": ((layers, f, d), out_of),
        "norm": ((d,), P("fsdp")),
        "head": ((d, shape.vocab_size), P("fsdp", None)),
    }


def _loss(params: Any, batch: Any, shape: Decoder, mesh: jax.sharding.Mesh) -> jax.Array:
    rows = NamedSharding(mesh, P("fsdp"))
    ends = ("embedding", "norm", "head")
    x = jnp.take(params["embedding"], batch["tokens"], axis=0).astype(jnp.bfloat16)
    x = jax.lax.with_sharding_constraint(x, rows)

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        w = {name: value.astype(jnp.bfloat16) for name, value in weights.items()}
        h = _norm(x, weights["attention_norm"])
        q, k, v = ((h @ w[n]).reshape(*h.shape[:2], -1, _HEAD_DIM) for n in ("query", "key", "value"))
        q, k = (_rotate(a, batch["positions"]) for a in (q, k))
        x = x + _attend(q, k, v, batch["segment_ids"], mesh).reshape(h.shape[0], h.shape[1], -1) @ w["output"]
        x = jax.lax.with_sharding_constraint(x, rows)
        h = _norm(x, weights["ffn_norm"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return jax.lax.with_sharding_constraint(x, rows), None

    again = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    x, _ = jax.lax.scan(again, x, {name: p for name, p in params.items() if name not in ends})
    logits = (_norm(x, params["norm"]) @ params["head"].astype(jnp.bfloat16)).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + _EPS)
    return (normed * scale[None, None]).astype(x.dtype)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    frequencies = 10_000.0 ** (-np.arange(0, _HEAD_DIM, 2) / _HEAD_DIM).astype(np.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, mesh: jax.sharding.Mesh
) -> jax.Array:
    length, heads = q.shape[1:3]
    sizes = splash.BlockSizes(
        **dict.fromkeys(
            ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"), _BLOCK
        )
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(q, k, v, segments)

    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * _HEAD_DIM**-0.5, k, v))
    split = jax.shard_map(rows, mesh=mesh, in_specs=(P("fsdp"),) * 4, out_specs=P("fsdp"), check_vma=False)
    return jnp.swapaxes(split(q, k, v, segments), 1, 2)
