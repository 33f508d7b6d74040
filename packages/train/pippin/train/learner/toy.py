"""Parameters and their facts for the learner's tests, without a model."""

from typing import Any

import numpy as np

from pippin.core.module import ParameterInfo, Params, flatten_params, unflatten_params

VOCAB, DIM, HIDDEN, LAYERS = 7, 4, 6, 3

_TYPES = {
    "causal_lm": "pippin.toy.CausalLM",
    "embedding": "pippin.toy.Embedding",
    "attention": "pippin.toy.Attention",
    "feed_forward": "pippin.toy.FeedForward",
    "linear": "pippin.toy.Linear",
    "norm": "pippin.toy.Norm",
}


def info(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *interfaces: str) -> ParameterInfo:
    """The facts of a float32 parameter of a component inside others, the root a causal_lm."""
    provides = ("causal_lm", *interfaces)
    owners = tuple(_TYPES[name] for name in provides)
    return ParameterInfo(
        path=path, owners=owners, provides=provides, shape=shape, dtype=np.float32, axes=axes
    )


def infos() -> dict[str, Any]:
    """Of a stack of three layers between an embedding and a norm."""
    square, wide = (LAYERS, DIM, DIM), (LAYERS, DIM, HIDDEN)
    found = [
        info("embedding.weight", (VOCAB, DIM), ("vocab", "input"), "embedding"),
        info("layers.attention.q.weight", square, ("layers", "input", "heads"), "attention", "linear"),
        info("layers.attention.q_norm.scale", (LAYERS, DIM), ("layers", None), "attention", "norm"),
        info("layers.mlp.up.weight", wide, ("layers", "input", "mlp"), "feed_forward", "linear"),
        info("layers.mlp.up.bias", (LAYERS, HIDDEN), ("layers", "mlp"), "feed_forward", "linear"),
        info("norm.scale", (DIM,), (None,), "norm"),
    ]
    return unflatten_params({i.path: i for i in found})


def params(seed: int = 0, scale: float = 1.0) -> Params:
    """Normal float32 values in numpy, a tree of the structure of `infos`."""
    rng = np.random.default_rng(seed)
    facts = flatten_params(infos())
    return unflatten_params(
        {path: (scale * rng.standard_normal(i.shape)).astype(np.float32) for path, i in facts.items()}
    )
