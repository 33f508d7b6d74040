"""Configs of mixtures of experts."""

from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError
from pippin.layers.feed_forward_config import Activation
from pippin.layers.linear_config import GroupedLinearConfig, LinearConfig


class TopKRouterConfig(Config, implementation="pippin.layers.moe:TopKRouter", provides="router"):
    """Chooses the k experts with the largest logits for each token. The holder sets the dims."""

    input_dim: Required[int] = REQUIRED
    num_experts: Required[int] = REQUIRED
    top_k: Required[int] = REQUIRED
    # Weights are a softmax over the chosen logits alone, so that they add up to one.
    normalise_chosen: bool = True
    soft_cap: float | None = None  # logits become cap * tanh(logit / cap); PT-MoE uses 50
    balance_loss: float = 0.01  # weight of the load-balance loss
    z_loss: float = 0.001  # weight of mean(logsumexp(logits)^2)
    proj: Annotated[Config, Slot("linear")] = LinearConfig()

    def validate(self) -> None:
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(
                f"TopKRouter: soft_cap ({self.soft_cap}) must be positive: logits are divided by it. "
                "Leave it None for no cap."
            )


class MoEConfig(Config, implementation="pippin.layers.moe:MoE", provides="feed_forward"):
    """A feed-forward of many experts, of which each token visits the few that its router chooses."""

    input_dim: Required[int] = REQUIRED
    hidden_dim: Required[int] = REQUIRED  # of one expert
    num_experts: int = 8
    top_k: int = 2
    activation: Activation = Activation.SILU
    router: Annotated[Config, Slot("router")] = TopKRouterConfig()
    experts: Annotated[Config, Slot("grouped_linear")] = GroupedLinearConfig()

    def validate(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"MoE: top_k ({self.top_k}) must lie between 1 and num_experts ({self.num_experts}). "
                "Lower top_k or add experts."
            )
