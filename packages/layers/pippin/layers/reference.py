"""The arithmetic of layers in NumPy and float64, written from the papers' formulas: what tests compare with.

Loops over tokens and heads, so that nothing is shared with the layers but the
formula. Parameters are the dicts of `pippin.core.module.split`, of one layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Params = Mapping[str, Any]
Sees = Callable[[int, int, int], bool]  # (row, query, key)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.where(x > 0, x, 0.0),
}


def logsumexp(x: np.ndarray) -> Any:  # of one dim less: a number where x has one
    top = x.max(axis=-1, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - np.expand_dims(logsumexp(x), -1))


def linear(p: Params, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(p["weight"]) + np.asarray(p.get("bias", 0.0))


def rms_norm(p: Params, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(p["scale"])


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """RoPE of [B, T, N, H]: dims i and i + H/2 are the parts of a complex number, which is turned."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sees: Sees,
    *,
    soft_cap: float | None = None,
    slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    distance: Callable[[int, int, int], int] = lambda b, t, s: t - s,
) -> np.ndarray:
    """softmax(q k / sqrt(H)) v of [B, T, N, H] over the keys that each query sees; 0 where it sees none."""
    out = np.zeros_like(q)
    batch, length, heads, dim = q.shape
    for b, t, n in np.ndindex(batch, length, heads):
        kv_head = n * k.shape[2] // heads
        keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if not keys:
            continue
        logits = np.array([q[b, t, n] @ k[b, s, kv_head] for s in keys]) / np.sqrt(dim)
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        if slopes is not None:
            logits = logits - slopes[n] * np.array([distance(b, t, s) for s in keys])
        if sinks is not None:
            logits = np.append(logits, sinks[n])
        weights = softmax(logits)[: len(keys)]
        out[b, t, n] = sum(w * v[b, s, kv_head] for w, s in zip(weights, keys, strict=True))
    return out


def causal(positions: np.ndarray, segments: np.ndarray | None = None, window: int | None = None) -> Sees:
    """Which keys a query sees among tokens at these positions [B, T] of these segments."""

    def sees(b: int, t: int, s: int) -> bool:
        if segments is not None and segments[b, t] != segments[b, s]:
            return False
        distance = positions[b, t] - positions[b, s]
        return bool(distance >= 0 and (window is None or distance < window))

    return sees


def attention(
    p: Params,
    x: np.ndarray,
    positions: np.ndarray,
    *,
    head_dim: int,
    theta: float | None = 500_000.0,
    norm_first: bool = False,
    segments: np.ndarray | None = None,
    window: int | None = None,
    kv: tuple[np.ndarray, np.ndarray] | None = None,
    **kwargs: Any,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Grouped-query attention of [B, T, D], and its keys and values; `kv` stands in for those of another layer."""

    def heads(projection: str) -> np.ndarray:
        return linear(p[projection], x).reshape(*x.shape[:2], -1, head_dim)

    def encode(h: np.ndarray, norm: str) -> np.ndarray:
        def normed(h: np.ndarray) -> np.ndarray:
            return rms_norm(p[norm], h) if norm in p else h

        def rotated(h: np.ndarray) -> np.ndarray:
            return h if theta is None else rotate(h, positions, theta)

        return rotated(normed(h)) if norm_first else normed(rotated(h))

    q = encode(heads("q_proj"), "q_norm")
    k, v = kv or (encode(heads("k_proj"), "k_norm"), heads("v_proj"))
    sinks = np.asarray(p["sinks"]) if "sinks" in p else None
    out = attend(q, k, v, causal(positions, segments, window), sinks=sinks, **kwargs)
    return linear(p["o_proj"], out.reshape(*x.shape[:2], -1)), (k, v)


def feed_forward(p: Params, x: np.ndarray, activation: str = "silu") -> np.ndarray:
    gate = ACTIVATIONS[activation](linear(p["gate_proj"], x))
    return linear(p["down_proj"], gate * linear(p["up_proj"], x))


def moe(
    p: Params, x: np.ndarray, top_k: int, *, normalise: bool = True, soft_cap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A mixture of experts over [M, D], token by token, and the router's logits [M, E]."""
    logits = linear(p["router"]["proj"], x)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    out = np.zeros_like(x)
    for m in range(x.shape[0]):
        chosen = np.argsort(-logits[m], kind="stable")[:top_k]
        weights = softmax(logits[m, chosen]) if normalise else softmax(logits[m])[chosen]
        for e, w in zip(chosen, weights, strict=True):
            expert = {
                name: {"weight": p[name]["weight"][e]} for name in ("gate_proj", "up_proj", "down_proj")
            }
            out[m] += w * feed_forward(expert, x[m])
    return out, logits


def transformer_layer(p: Params, x: np.ndarray, positions: np.ndarray, **kwargs: Any) -> Any:
    """One pre-norm layer of [B, T, D], and its keys and values. `kwargs` are those of `attention`."""
    attended, kv = attention(p["attention"], rms_norm(p["attention_norm"], x), positions, **kwargs)
    x = x + attended
    return x + feed_forward(p["feed_forward"], rms_norm(p["feed_forward_norm"], x)), kv


def layer_of(p: Any, index: int) -> Any:
    """The parameters of one layer of a stack."""
    return {k: layer_of(v, index) for k, v in p.items()} if isinstance(p, Mapping) else np.asarray(p)[index]


def causal_lm(
    p: Params, tokens: np.ndarray, positions: np.ndarray, num_layers: int, **kwargs: Any
) -> np.ndarray:
    """The logits [B, T, V] of a model with a repeated layer and a tied head. `kwargs` are those of `attention`."""
    return hidden_states(p, tokens, positions, num_layers, **kwargs) @ np.asarray(p["embedding"]["weight"]).T


def hidden_states(
    p: Params, tokens: np.ndarray, positions: np.ndarray, num_layers: int, **kwargs: Any
) -> np.ndarray:
    """What `causal_lm` makes logits of, [B, T, D]: behind the last norm."""
    x = np.asarray(p["embedding"]["weight"])[tokens]
    for i in range(num_layers):
        x, _ = transformer_layer(layer_of(p["decoder"]["layer"], i), x, positions, **kwargs)
    return rms_norm(p["norm"], x)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> Any:
    """-log softmax(logits)[target] of [..., V]."""
    return logsumexp(logits) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
