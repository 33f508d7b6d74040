"""pippin's training step, as a contender. argv: a shape as JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import protocol
from benchmarks.shapes import Shape
from pippin.core.config_tree import override
from pippin.core.module import parameter_infos, split
from pippin.layers.models.llama import llama
from pippin.layers.position_config import RoPEConfig
from pippin.train.learner.config import AdamWConfig, ConstantScheduleConfig, LearnerConfig
from pippin.train.step import TrainState, make_step


def start(shape: Shape):
    cfg = llama(
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=shape.dim // shape.num_heads,
        hidden_dim=shape.hidden_dim,
        tied=True,
        position=RoPEConfig(theta=10_000.0),
    )
    # A turn of the loop over layers copies what the backward pass keeps; with several layers a turn, XLA on a CPU copies
    # less. Compile time does not grow with depth all the same.
    cfg = override(cfg, {"decoder.unroll": min(4, shape.num_layers)})
    model = cfg.build(rngs=nnx.Rngs(0))
    definition, params = split(model)
    learner_cfg = LearnerConfig(
        learning_rate=1e-3,
        optimizer=AdamWConfig(weight_decay=0.01),
        schedule=ConstantScheduleConfig(),
        clip_norm=1.0,
    )
    learner = learner_cfg.build(infos=parameter_infos(model))
    state = TrainState(jnp.zeros([], jnp.int32), params, learner.init(params))
    batch = _batch(shape)
    began = time.monotonic()
    step = jax.jit(make_step(definition, learner, 1), donate_argnums=0).lower(state, batch).compile()
    facts = {
        "params": sum(x.size for x in jax.tree.leaves(params)),
        "compile_s": time.monotonic() - began,
        "version": f"jax {jax.__version__}",
    }

    def train(steps: int) -> float:
        nonlocal state
        metrics = {}
        for _ in range(steps):
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return train, facts


def _batch(shape: Shape):
    size = (shape.batch_size, shape.sequence_length)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (size[0], size[1] + 1)).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.tile(jnp.arange(size[1], dtype=jnp.int32), (size[0], 1)),
        "segment_ids": jnp.ones(size, jnp.int32),
        "loss_weights": jnp.ones(size, jnp.float32),
    }


if __name__ == "__main__":
    protocol.serve(lambda: start(Shape(**json.loads(sys.argv[1]))))
