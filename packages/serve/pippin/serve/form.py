"""The form in which a model is served: which arrays it has, and where they lie."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pippin.core.module import Params
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear_int8 import with_int8_weights
from pippin.layers.unrolled import unrolled, untied
from pippin.serve.placement import Placement


@dataclasses.dataclass(frozen=True)
class Form:
    """What is chosen of it."""

    placement: Placement | None = None  # the devices that share the model; None: it lies on one
    int8_weights: bool = False  # of linear maps and the embedding
    int8_cache: bool = False  # keys and values

    def of(self, cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
        """A trained model in this form.

        Args:
            cfg: its config.
            params: its parameters: NumPy's arrays, or what `jax.eval_shape` has for arrays.

        Raises:
            ShardingError: so many devices cannot share the model.
        """
        cfg, params = untied(*unrolled(cfg, params))
        if self.int8_weights:
            cfg, params = with_int8_weights(cfg, params)
        return (cfg, params) if self.placement is None else self.placement.fit(cfg, params)
