"""The model that a package was made of, in JAX: what the package's logits are held against."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pippin.core.bundle import Bundle
from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.core.quantized_array import QuantizedArray
from pippin.export.model_source import ModelSource
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.quant.settle import settled, settled_config
from pippin.v1 import export_pb2 as pb


class JaxReference:
    """A model in float32. Texts of many lengths are filled up to one, so that it is compiled once."""

    def __init__(self, cfg: CausalLMConfig, params: Mapping[str, Any], length: int):
        """
        Args:
            cfg: the model.
            params: its weights by dotted path.
            length: tokens of a text at most.
        """
        cfg = cfg.set(activation_dtype=FloatType.FLOAT32)
        definition, _ = nnx.eval_shape(lambda: split(cfg.build(rngs=nnx.Rngs(0))))
        self._length = length
        self._params = unflatten_params({n: jnp.asarray(v, jnp.float32) for n, v in params.items()})
        self._logits = jax.jit(lambda params, ids: merge(definition, params)(ids))

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits after each token, float32 [T, V]."""
        padded = np.array([ids + [0] * (self._length - len(ids))], np.int32)
        return np.asarray(self._logits(self._params, padded))[0, : len(ids)]


def float_reference(bundle: Bundle, length: int) -> JaxReference:
    """The model as it is."""
    assert isinstance(bundle.component, CausalLMConfig)
    return JaxReference(bundle.component, flatten_params(bundle.params()), length)


def stored_reference(bundle: Bundle, length: int) -> JaxReference:
    """The model with weights rounded to float16, as a package stores them; weights that were rounded in training, so."""
    cfg, params = bundle.component, bundle.params()
    assert isinstance(cfg, CausalLMConfig)
    if settled_config(cfg) != cfg:
        cfg, params = settled(cfg, params)
    return JaxReference(cfg, {n: _as_stored(v) for n, v in flatten_params(params).items()}, length)


def adapted_reference(
    source: ModelSource, flat: np.ndarray, layout: pb.AdapterLayout, length: int
) -> JaxReference:
    """The model as a package stores it, with an adapter in its weights.

    Args:
        source: the model, whose layers are not stacked.
        flat: the adapter, as a package takes it.
        layout: where its matrices lie in it.
        length: tokens of a text at most.
    """
    params = {name: _as_stored(values) for name, values in source.params.items()}
    parts = {
        slot.name: flat[slot.offset : slot.offset + math.prod(slot.shape)]
        .reshape(tuple(slot.shape))
        .astype(np.float32)
        for slot in layout.slots
    }
    for path in (name.removesuffix(".down") for name in parts if name.endswith(".down")):
        params[f"{path}.weight"] = params[f"{path}.weight"] + parts[f"{path}.down"] @ parts[f"{path}.up"]
    return JaxReference(source.cfg, params, length)


def _as_stored(values: Any) -> np.ndarray:
    if isinstance(values, QuantizedArray):
        return values.dequantized()
    return np.asarray(values).astype(np.float16).astype(np.float32)


def cross_entropies(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each target under its row of logits, in nats: float64 [T]."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - peak).sum(axis=-1)) + peak[:, 0]
    return total - wide[np.arange(len(targets)), targets]
