"""Position encodings: each rotates queries and keys, or biases logits, or does neither."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.layers.position_config import ALiBiConfig, Llama3ScalingConfig, NoPEConfig, RoPEConfig
from pippin.layers.precision import at_least_float32


class NoPE(Module):
    """Leaves queries, keys and logits as they are.

    Source: Kazemnejad et al. 2023, arXiv:2305.19466.
    """

    Config = NoPEConfig

    def __init__(self, cfg: NoPEConfig):
        del cfg

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        return x

    def bias(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"] | None:
        return None


class RoPE(Module):
    """Rotates dims i and i + H/2 of each head by `position * theta^(-2i/H)`.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2; the pairing of the two
    halves is that of the public Llama checkpoints.
    """

    Config = RoPEConfig

    def __init__(self, cfg: RoPEConfig):
        frequencies = cfg.theta ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
        if cfg.scaling is not None:
            frequencies = _llama3_scaled(frequencies, cfg.scaling)
        # A tuple: constants of the program, not parameters.
        self.frequencies = tuple(frequencies.tolist())

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        dtype = at_least_float32(x.dtype)
        frequencies = jnp.asarray(self.frequencies, dtype)
        angles = positions.astype(dtype)[:, :, None, None] * frequencies[None, None, None, :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(dtype), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)

    def bias(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"] | None:
        return None


class ALiBi(Module):
    """Adds `-slope * (query position - key position)` to the logits of each head.

    Source: Press et al. 2021, arXiv:2108.12409, section 3; slopes for a number of heads
    that is no power of two as in its appendix.
    """

    Config = ALiBiConfig

    def __init__(self, cfg: ALiBiConfig):
        self.slopes = _alibi_slopes(cfg.num_heads)

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        return x

    def bias(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"] | None:
        distance = (query[:, :, None] - key[:, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes, jnp.float32)[None, :, None, None] * distance[:, None]


def _alibi_slopes(num_heads: int) -> tuple[float, ...]:
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    # The heads that are left over take every other slope of twice as many heads.
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return tuple(slopes)


def _llama3_scaled(frequencies: np.ndarray, cfg: Llama3ScalingConfig) -> np.ndarray:
    """Frequencies below a threshold divided by a factor, with a smooth step to those left alone.

    Source: Llama 3 (arXiv:2407.21783); the form is that of the `llama3` rope type of public configs.
    """
    turns = cfg.original_context * frequencies / (2 * np.pi)  # full rotations over the original context
    smooth = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / cfg.factor + smooth * frequencies
