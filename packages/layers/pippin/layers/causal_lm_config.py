"""The config of a causal language model."""

import enum
from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError
from pippin.layers.linear_config import EmbeddingConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.stack_config import RepeatConfig


class FloatType(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class CausalLMConfig(Config, implementation="pippin.layers.causal_lm:CausalLM", provides="causal_lm"):
    """Embedding, layers, norm and head, and the loss of predicting the next token."""

    vocab_size: Required[int] = REQUIRED
    dim: Required[int] = REQUIRED
    embedding: Annotated[Config, Slot("embedding")] = EmbeddingConfig()
    decoder: Annotated[Config, Slot("layer")] = RepeatConfig()
    norm: Annotated[Config, Slot("norm")] = RMSNormConfig()
    head: Annotated[Config, Slot("linear")] | None = None  # None: logits by the embedding (tied)
    logit_soft_cap: float | None = None
    activation_dtype: FloatType = FloatType.FLOAT32
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)^2)
    loss_chunk_tokens: int = 1024  # the loss makes logits for so many tokens at a time, on each device

    def validate(self) -> None:
        if self.loss_chunk_tokens < 1:
            raise ConfigError(
                f"CausalLM: loss_chunk_tokens ({self.loss_chunk_tokens}) must be at least 1. "
                "Fewer tokens take less memory, and more steps."
            )
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ConfigError(
                f"CausalLM: logit_soft_cap ({self.logit_soft_cap}) must be positive: logits are divided by it. "
                "Leave it None for no cap."
            )
