"""The form in which a model is served: which arrays it has, and where they lie."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pippin.core.config_tree import traverse
from pippin.core.errors import ConfigError
from pippin.core.module import Params, split
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear_config import multi_lora
from pippin.layers.linear_int8 import with_int8_weights
from pippin.layers.linear_multi_lora import with_room
from pippin.layers.stack_config import ParallelTracksConfig
from pippin.layers.unrolled import unrolled, untied
from pippin.serve.placement import Placement, with_key_heads


@dataclasses.dataclass(frozen=True)
class AdapterRoom:
    """How many adapters a model has room for, and of which rank."""

    count: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Form:
    """What is chosen of it."""

    placement: Placement | None = None  # the devices that share the model; None: it lies on one
    int8_weights: bool = False  # of linear maps and the embedding
    int8_cache: bool = False  # keys and values
    room: AdapterRoom | None = None  # for adapters

    def of(self, cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, Params]:
        """A trained model in this form.

        Args:
            cfg: its config.
            params: its parameters: NumPy's arrays, or what `jax.eval_shape` has for arrays.

        Raises:
            ConfigError: it has a part that cannot have adapters.
            ShardingError: so many devices cannot share the model.
        """
        cfg, params = untied(*unrolled(cfg, params))
        if self.int8_weights:
            cfg, params = with_int8_weights(cfg, params)
        if self.room is not None:
            cfg, params = self._with_room(self.room, cfg, params)
        return (cfg, params) if self.placement is None else self.placement.fit(cfg, params)

    def _with_room(
        self, room: AdapterRoom, cfg: CausalLMConfig, params: Params
    ) -> tuple[CausalLMConfig, Params]:
        """The same model with room for adapters in the linear maps of its layers."""
        for _, part in traverse(cfg):
            if isinstance(part, ParallelTracksConfig):
                raise ConfigError(
                    "a model with ParallelTracks has no room for adapters. Serve it without --adapters."
                )
        if self.placement is not None and with_key_heads(cfg, self.placement.ways) != cfg:
            raise ConfigError(
                f"{self.placement.ways} devices share this model by repeating its key heads, and adapters have no more of "
                "them than it has itself. Serve it without --adapters, or with as many devices as divide its key heads."
            )
        roomy = cfg.set(decoder=multi_lora(num_adapters=room.count, rank=room.rank)(cfg.decoder))
        _, shapes = split(nnx.eval_shape(lambda: roomy.build(rngs=nnx.Rngs(0))))
        return roomy, with_room(params, shapes, jnp.dtype(cfg.activation_dtype.value))
