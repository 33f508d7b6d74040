"""Rules of linear maps, embeddings and norms."""

from __future__ import annotations

import numpy as np

from pippin.export.coreml_tools import Builder as mb
from pippin.export.lower_emitter import Emitter, Var, rule, scalar
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig, LoRALinearConfig, QuantizedLinearConfig
from pippin.layers.norm_config import RMSNormConfig

_LEAST = 0.01  # below it, a vector is not made larger before its squares are summed


def product(e: Emitter, x: Var, name: str, *, transposed: bool, bias: Var | None = None) -> Var:
    """`x @ weight.T + bias`, of a weight that is stored [outputs, inputs]."""
    weight = e.weight(name, transposed=transposed)
    outputs = weight.shape[0]
    if bias is None:
        # Core ML's linear map has one in any case: one vector of zeros serves all maps of a size.
        bias = e.constant(f"zeros_{outputs}", np.zeros(outputs, np.float16))
    return mb.linear(x=x, weight=weight, bias=bias)


# Weights that are multiplied as 8-bit numbers in training are the same weights.
@rule(LinearConfig, QuantizedLinearConfig)
def _linear(e: Emitter, cfg: LinearConfig, path: str, x: Var) -> Var:
    bias = e.weight(f"{path}.bias") if cfg.bias else None
    y = product(e, x, f"{path}.weight", transposed=True, bias=bias)
    added = e.low_rank(path, x)
    return y if added is None else mb.add(x=y, y=added)


@rule(LoRALinearConfig)
def _lora_linear(e: Emitter, cfg: LoRALinearConfig, path: str, x: Var) -> Var:
    low = product(e, x, f"{path}.down", transposed=True)
    low = product(e, low, f"{path}.up", transposed=True)
    if cfg.alpha != cfg.rank:
        low = mb.mul(x=low, y=scalar(cfg.alpha / cfg.rank))
    return mb.add(x=e.emit(cfg.base, f"{path}.base", x), y=low)


@rule(EmbeddingConfig)
def _embedding(e: Emitter, cfg: EmbeddingConfig, path: str, ids: Var) -> Var:
    return mb.gather(x=e.weight(f"{path}.weight"), indices=ids, axis=0, validate_indices=False)


@rule(RMSNormConfig)
def _rms_norm(e: Emitter, cfg: RMSNormConfig, path: str, x: Var) -> Var:
    # In float16 the square of 256 is infinite: the vector is divided by its largest number first, and eps with it.
    largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
    largest = mb.maximum(x=largest, y=scalar(_LEAST))
    x = mb.real_div(x=x, y=largest)
    squares = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
    root_eps = mb.real_div(x=scalar(cfg.eps**0.5), y=largest)
    x = mb.mul(x=x, y=mb.rsqrt(x=mb.add(x=squares, y=mb.mul(x=root_eps, y=root_eps)), epsilon=scalar(0.0)))
    return mb.mul(x=x, y=e.weight(f"{path}.scale"))
