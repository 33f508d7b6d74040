"""The model that a package was made of, in JAX: what the package's logits are held against."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pippin.core.bundle import Bundle
from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType


class JaxReference:
    """A model in float32. Texts of many lengths are filled up to one, so that it is compiled once."""

    def __init__(self, bundle: Bundle, length: int, *, as_float16: bool):
        """
        Args:
            bundle: the model.
            length: tokens of a text at most.
            as_float16: whether weights are rounded to float16, as a package stores them.
        """
        cfg = bundle.component
        assert isinstance(cfg, CausalLMConfig)
        cfg = cfg.set(activation_dtype=FloatType.FLOAT32)
        definition, _ = nnx.eval_shape(lambda: split(cfg.build(rngs=nnx.Rngs(0))))
        self._length = length
        flat = flatten_params(bundle.params())
        self._params = unflatten_params({n: jnp.asarray(_stored(v, as_float16)) for n, v in flat.items()})
        self._logits = jax.jit(lambda params, ids: merge(definition, params)(ids))

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits after each token, float32 [T, V]."""
        padded = np.array([ids + [0] * (self._length - len(ids))], np.int32)
        return np.asarray(self._logits(self._params, padded))[0, : len(ids)]


def _stored(values: Any, as_float16: bool) -> np.ndarray:
    values = np.asarray(values)
    return (values.astype(np.float16) if as_float16 else values).astype(np.float32)


def cross_entropies(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each target under its row of logits, in nats: float64 [T]."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - peak).sum(axis=-1)) + peak[:, 0]
    return total - wide[np.arange(len(targets)), targets]
