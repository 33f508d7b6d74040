"""Configs of feed-forwards."""

import enum
from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.layers.linear_config import LinearConfig


class Activation(enum.StrEnum):
    SILU = "silu"
    GELU = "gelu"  # by its tanh approximation
    RELU = "relu"


class FeedForwardConfig(
    Config, implementation="pippin.layers.feed_forward:FeedForward", provides="feed_forward"
):
    """`down(activation(gate(x)) * up(x))`. The holder sets the input dim."""

    input_dim: Required[int] = REQUIRED
    hidden_dim: Required[int] = REQUIRED
    activation: Activation = Activation.SILU
    gate_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    up_proj: Annotated[Config, Slot("linear")] = LinearConfig()
    down_proj: Annotated[Config, Slot("linear")] = LinearConfig()
