"""Configs of position encodings: what attention learns of where a token stands."""

from pippin.core.config import REQUIRED, Config, Required
from pippin.core.errors import ConfigError


class Llama3ScalingConfig(Config):
    """Slower rotations for the low frequencies: the context lengthening of Llama 3.1."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def validate(self) -> None:
        if self.factor <= 0 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"Llama3Scaling: factor ({self.factor}) must be positive, and low_freq_factor "
                f"({self.low_freq_factor}) positive and below high_freq_factor ({self.high_freq_factor}). "
                "Llama 3.1 uses 8, 1 and 4."
            )


class RoPEConfig(Config, implementation="pippin.layers.position:RoPE", provides="position"):
    """Rotation of queries and keys by angles that grow with the position. The holder sets the head's dims."""

    head_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED
    # AFM: 500,000, and 6,315,089 for the stage that lengthens the context to 32k.
    theta: float = 500_000.0
    scaling: Llama3ScalingConfig | None = None

    def validate(self) -> None:
        if isinstance(self.head_dim, int) and self.head_dim % 2:
            raise ConfigError(
                f"RoPE: head_dim ({self.head_dim}) must be even, as dims are rotated in pairs. "
                "Choose an even one, or a position encoding that does not rotate."
            )
        if self.theta <= 0:
            raise ConfigError(f"RoPE: theta ({self.theta}) must be positive. AFM uses 500,000.")


class NoPEConfig(Config, implementation="pippin.layers.position:NoPE", provides="position"):
    """No position encoding: causal attention alone orders the tokens."""

    head_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED


class ALiBiConfig(Config, implementation="pippin.layers.position:ALiBi", provides="position"):
    """A penalty on logits that grows with the distance, with another slope for each head."""

    head_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED
