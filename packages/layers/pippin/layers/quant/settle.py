"""Models that were trained with rounded weights, as the weights that they were rounded to."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pippin.core.config import Config
from pippin.core.config_tree import inherit, transform
from pippin.core.module import Params, flatten_params, unflatten_params
from pippin.core.quantized_array import Palettized
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig, LoRALinearConfig, map_linears
from pippin.layers.quant.fake_quant import FakeQuantEmbedding, FakeQuantLinear, palette
from pippin.layers.quant.fake_quant_config import (
    FakeQuantEmbeddingConfig,
    FakeQuantKVKernelConfig,
    FakeQuantLinearConfig,
)
from pippin.layers.unrolled import unrolled


def factor_paths(cfg: Config) -> set[str]:
    """The parameters, by dotted path, that a model has for its rounded weights alone."""
    return {f"{path}.factor" for path in _rounding(cfg)}


def settled_config(cfg: Any) -> Any:
    """The same tree with layers that do not round."""

    def plain(cfg: Config) -> Config:
        if isinstance(cfg, LoRALinearConfig):
            return cfg.set(base=plain(cfg.base))
        return inherit(LinearConfig(), cfg) if isinstance(cfg, FakeQuantLinearConfig) else cfg

    def other(cfg: Config) -> Config:
        if isinstance(cfg, FakeQuantEmbeddingConfig):
            return inherit(EmbeddingConfig(), cfg)
        return cfg.kernel if isinstance(cfg, FakeQuantKVKernelConfig) else cfg

    return transform(map_linears(cfg, plain, lambda _: None, inside=True), other)


def settled(cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
    """A model without loops, whose weights that were rounded in training are `Palettized`.

    With the palettes as floats it computes what the trained one does, but for keys and values, which the cache of whoever runs
    it rounds, or does not.

    Args:
        cfg: of any model.
        params: its parameters, NumPy's or JAX's.
    """
    cfg, params = unrolled(cfg, params)
    flat = flatten_params(params)
    for path, layer in _rounding(cfg).items():
        weight, factor = jnp.asarray(flat[f"{path}.weight"]), jnp.asarray(flat.pop(f"{path}.factor"))
        is_linear = isinstance(layer, FakeQuantLinear)
        indices, luts = map(np.asarray, palette(weight.T if is_linear else weight, factor, layer.bits))
        flat[f"{path}.weight"] = (
            Palettized(np.ascontiguousarray(indices.T), luts[None], layer.bits)
            if is_linear
            else Palettized(indices, luts[:, None], layer.bits)
        )
    return settled_config(cfg), unflatten_params(flat)


def _rounding(cfg: Config) -> dict[str, FakeQuantLinear | FakeQuantEmbedding]:
    """The layers of a model that round, abstract, by dotted path."""
    module = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, FakeQuantLinear | FakeQuantEmbedding)
    }
