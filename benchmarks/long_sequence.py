"""The memory of one training step over a long sequence on this CPU. argv: blockwise or naive attention; chunked or naive loss."""

from __future__ import annotations

import json
import resource
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from pippin.core.config_tree import override
from pippin.core.module import merge, split
from pippin.layers.kernel_config import BlockwiseKernelConfig, ReferenceKernelConfig
from pippin.layers.models.llama import llama
from pippin.layers.position_config import RoPEConfig

_VOCAB_SIZE = 32_000


def measure(attention: str, loss: str, length: int = 8192) -> dict[str, float]:
    """The bytes that XLA plans for temporaries, and the peak of the process.

    Args:
        attention: "blockwise", or "naive": all logits of a head at once.
        loss: "chunked", or "naive": all logits of the sequence at once.
        length: of the one sequence, in tokens.
    """
    cfg = llama(
        vocab_size=_VOCAB_SIZE,
        dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        hidden_dim=768,
        tied=True,
        position=RoPEConfig(theta=10_000.0),
    )
    kernel = BlockwiseKernelConfig() if attention == "blockwise" else ReferenceKernelConfig()
    changes = {"decoder.layer.attention.kernel": kernel, "decoder.remat": "full"}
    if loss == "naive":
        changes["loss_chunk_tokens"] = length
    definition, params = split(override(cfg, changes).build(rngs=nnx.Rngs(0)))
    row = jnp.arange(length, dtype=jnp.int32)[None]
    batch = {
        "tokens": row % _VOCAB_SIZE,
        "targets": (row + 1) % _VOCAB_SIZE,
        "positions": row,
        "segment_ids": jnp.ones_like(row),
        "loss_weights": jnp.ones(row.shape, jnp.float32),
    }
    step = jax.jit(jax.grad(lambda p, b: merge(definition, p).loss(b)[0])).lower(params, batch).compile()
    jax.block_until_ready(step(params, batch))
    return {
        "temporary_bytes": float(step.memory_analysis().temp_size_in_bytes),
        "peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))
