"""A tiny Llama for tests, written with coremltools' builder, and the same in NumPy with float64.

It has the interface of pippin's packages, and none of its lowering.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pippin.export.coreml_tools import Builder as mb
from pippin.export.mil.testing import save_package, state, sub_byte, tensor

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 32, 4, 2, 8, 48, 64
CONTEXT, PREFILL = 32, 8
GROUP = 16  # rows that share a table
_EPSILON = 1e-5
_CACHE = (LAYERS, 1, KV_HEADS, CONTEXT, HEAD_DIM)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Palettised maps and plain ones, [outputs, inputs]."""

    indices: dict[str, np.ndarray]
    luts: dict[str, np.ndarray]
    embedding: np.ndarray  # int8
    scale: np.ndarray
    norms: np.ndarray

    def dense(self, name: str) -> np.ndarray:
        """A map in float64."""
        if name == "embedding":
            return (self.embedding * self.scale.astype(np.float64)).astype(np.float16).astype(np.float64)
        lut = self.luts[name].astype(np.float64)[:, 0, :, 0]
        return np.stack([lut[i // GROUP][row] for i, row in enumerate(self.indices[name])])


def tiny_weights(seed: int = 0) -> Weights:
    """Random weights, those of queries scaled by the root of the head's size."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (HEADS * HEAD_DIM, DIM), "k": (KV_HEADS * HEAD_DIM, DIM), "v": (KV_HEADS * HEAD_DIM, DIM)}
    shapes |= {
        "o": (DIM, HEADS * HEAD_DIM),
        "gate": (HIDDEN, DIM),
        "up": (HIDDEN, DIM),
        "down": (DIM, HIDDEN),
    }
    indices, luts = {}, {}
    for layer in range(LAYERS):
        for name, (out, inputs) in shapes.items():
            key = f"{layer}.{name}"
            indices[key] = rng.integers(0, 16, (out, inputs)).astype(np.uint8)
            spread = inputs**-0.5 * (HEAD_DIM**-0.5 if name == "q" else 1)
            luts[key] = rng.normal(0, spread, (out // GROUP, 1, 16, 1)).astype(np.float16)
    embedding = rng.integers(-127, 128, (VOCAB, DIM)).astype(np.int8)
    scale = rng.uniform(0.002, 0.004, (VOCAB, 1)).astype(np.float16)
    return Weights(
        indices, luts, embedding, scale, rng.uniform(0.8, 1.2, (2 * LAYERS + 1, DIM)).astype(np.float16)
    )


def _angles() -> np.ndarray:
    rate = 10000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return np.arange(CONTEXT)[:, None] * rate[None]


def mask(position: int, length: int) -> np.ndarray:
    """The causal mask of a call."""
    seen = np.arange(CONTEXT)[None] <= position + np.arange(length)[:, None]
    return np.where(seen, 0, -np.inf).astype(np.float16)[None, None]


def save_tiny_llama(path: Path, weights: Weights) -> Path:
    """Writes the package, with the functions prefill and decode."""

    def inputs(length: int) -> dict[str, Any]:
        return {
            "inputIds": tensor("int32", 1, length),
            "position": tensor("int32", 1),
            "causalMask": tensor("float16", 1, 1, length, CONTEXT),
            "keyCache": state(*_CACHE),
            "valueCache": state(*_CACHE),
        }

    functions = {n: (inputs(t), partial(_body, weights, t)) for n, t in (("prefill", PREFILL), ("decode", 1))}
    return save_package(path, functions, "decode")


def _norm(x: Any, weight: np.ndarray) -> Any:
    mean = mb.reduce_mean(x=mb.square(x=x), axes=[-1], keep_dims=True)
    return mb.mul(x=mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=np.float16(_EPSILON))), y=weight)


def _rope(x: Any, cos: Any, sin: Any) -> Any:
    a, b = mb.split(x=x, num_splits=2, axis=-1)
    left = mb.sub(x=mb.mul(x=a, y=cos), y=mb.mul(x=b, y=sin))
    right = mb.add(x=mb.mul(x=b, y=cos), y=mb.mul(x=a, y=sin))
    return mb.concat(values=[left, right], axis=-1)


def _body(
    weights: Weights,
    length: int,
    inputIds: Any,
    position: Any,
    causalMask: Any,
    keyCache: Any,
    valueCache: Any,
) -> Any:
    linear = partial(_linear, weights)
    places = mb.add(x=position, y=np.arange(length, dtype=np.int32))
    cos, sin = (
        mb.gather(x=f(_angles()).astype(np.float16), indices=places, axis=0) for f in (np.cos, np.sin)
    )
    table = mb.constexpr_blockwise_shift_scale(data=weights.embedding, scale=weights.scale)
    x = mb.gather(x=table, indices=inputIds, axis=0)
    # [context, T]: which new token is at which place
    here = mb.equal(x=np.arange(CONTEXT, dtype=np.int32)[:, None], y=mb.expand_dims(x=places, axes=[0]))
    onto = mb.cast(x=here, dtype="fp16")
    is_new = mb.greater(x=mb.reduce_sum(x=onto, axes=[1], keep_dims=True), y=np.float16(0))
    caches = [mb.read_state(input=cache) for cache in (keyCache, valueCache)]
    new: list[list[Any]] = [[], []]
    for layer in range(LAYERS):
        h = _norm(x, weights.norms[2 * layer])
        q, k, v = (_heads(linear(h, f"{layer}.{n}"), length) for n in "qkv")
        q, k = _rope(q, cos, sin), _rope(k, cos, sin)
        for which, fresh in enumerate((k, v)):
            old = mb.slice_by_index(
                x=caches[which], begin=[layer, 0, 0, 0, 0], end=[0] * 5, end_mask=[False] + [True] * 4,
                squeeze_mask=[True] + [False] * 4,
            )  # fmt: skip
            new[which].append(mb.select(cond=is_new, a=mb.matmul(x=onto, y=fresh), b=old))
        grouped = mb.reshape(x=q, shape=[1, KV_HEADS, HEADS // KV_HEADS * length, HEAD_DIM])
        scores = mb.matmul(x=grouped, y=new[0][-1], transpose_y=True)
        scores = mb.reshape(x=scores, shape=[1, HEADS, length, CONTEXT])
        weighed = mb.softmax(x=mb.add(x=scores, y=causalMask), axis=-1)
        weighed = mb.reshape(x=weighed, shape=[1, KV_HEADS, HEADS // KV_HEADS * length, CONTEXT])
        mixed = mb.reshape(x=mb.matmul(x=weighed, y=new[1][-1]), shape=[1, HEADS, length, HEAD_DIM])
        flat = mb.reshape(x=mb.transpose(x=mixed, perm=[0, 2, 1, 3]), shape=[1, length, HEADS * HEAD_DIM])
        x = mb.add(x=x, y=linear(flat, f"{layer}.o"))
        h = _norm(x, weights.norms[2 * layer + 1])
        gated = mb.mul(x=mb.silu(x=linear(h, f"{layer}.gate")), y=linear(h, f"{layer}.up"))
        x = mb.add(x=x, y=linear(gated, f"{layer}.down"))
    for cache, parts in zip((keyCache, valueCache), new, strict=True):
        mb.coreml_update_state(state=cache, value=mb.stack(values=parts, axis=0))
    return mb.linear(x=_norm(x, weights.norms[-1]), weight=table, name="logits")


def _linear(weights: Weights, x: Any, name: str) -> Any:
    indices = sub_byte(weights.indices[name], "uint4")
    return mb.linear(x=x, weight=mb.constexpr_lut_to_dense(indices=indices, lut=weights.luts[name]))


def _heads(x: Any, length: int) -> Any:
    return mb.transpose(x=mb.reshape(x=x, shape=[1, length, -1, HEAD_DIM]), perm=[0, 2, 1, 3])


class Reference:
    """The model in float64. What it keeps of one call for the next is rounded to float16, as states are."""

    def __init__(self, weights: Weights):
        self._weights = weights
        empty = np.zeros((KV_HEADS, 0, HEAD_DIM))
        self._caches = [[empty, empty] for _ in range(LAYERS)]

    def extend(self, ids: list[int]) -> np.ndarray:
        """The logits after each token, [T, V]."""
        dense, start, length = self._weights.dense, self._caches[0][0].shape[1], len(ids)
        places = start + np.arange(length)
        cos, sin = (f(_angles()).astype(np.float16).astype(np.float64)[places] for f in (np.cos, np.sin))

        def heads(x: np.ndarray) -> np.ndarray:
            return x.reshape(length, -1, HEAD_DIM).transpose(1, 0, 2)

        def rope(x: np.ndarray) -> np.ndarray:
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        x = dense("embedding")[ids]
        for layer in range(LAYERS):
            h = self._norm(x, 2 * layer)
            q, k, v = (heads(h @ dense(f"{layer}.{n}").T) for n in "qkv")
            fresh = [np.concatenate(both, 1) for both in zip(self._caches[layer], (rope(k), v), strict=True)]
            self._caches[layer] = [c.astype(np.float16).astype(np.float64) for c in fresh]
            keys, values = (np.repeat(c, HEADS // KV_HEADS, 0) for c in fresh)
            scores = rope(q) @ keys.swapaxes(1, 2)
            scores = np.where(np.arange(start + length) <= places[:, None], scores, -np.inf)
            weighed = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weighed / weighed.sum(-1, keepdims=True) @ values
            x = x + mixed.transpose(1, 0, 2).reshape(length, -1) @ dense(f"{layer}.o").T
            h = self._norm(x, 2 * layer + 1)
            gate = h @ dense(f"{layer}.gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ dense(f"{layer}.up").T)) @ dense(f"{layer}.down").T
        return self._norm(x, 2 * LAYERS) @ dense("embedding").T

    def _norm(self, x: np.ndarray, which: int) -> np.ndarray:
        small = np.float64(np.float16(_EPSILON))
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + small) * self._weights.norms[which]
