"""The models that benchmarks train: the same decoder for every contender."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-like decoder with a tied head, and a batch of random tokens."""

    num_layers: int
    dim: int
    num_heads: int
    hidden_dim: int
    vocab_size: int
    batch_size: int = 4
    sequence_length: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sequence_length


SHAPES = {
    "S": Shape(num_layers=4, dim=256, num_heads=4, hidden_dim=768, vocab_size=8192),  # 5.5M parameters
    "M": Shape(num_layers=8, dim=512, num_heads=8, hidden_dim=1536, vocab_size=32_768),  # 44M
}


def depth_shape(num_layers: int) -> Shape:
    """A small model of any depth, to time compilation."""
    return Shape(
        num_layers=num_layers,
        dim=64,
        num_heads=2,
        hidden_dim=128,
        vocab_size=512,
        batch_size=2,
        sequence_length=64,
    )
