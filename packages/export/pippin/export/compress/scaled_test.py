"""Tests of scaled integers: whose scale, how exact, and what is refused."""

import numpy as np
import pytest

from pippin.core.errors import ConfigError, QuantizationError
from pippin.export.compress.config import ScaleConfig
from pippin.export.compress.palettize import Importance


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("fields, rows, shape, scales", [
    ({}, False, (64, 48), (1, 48)),  # one an output
    ({}, True, (64, 48), (64, 1)),  # one a row of an embedding
    ({"bits": 4, "block_size": 32}, False, (64, 48), (2, 48)),
    ({"bits": 8, "block_size": 16}, True, (64, 48), (64, 3)),
    ({"bits": 4, "block_size": 32}, False, (2, 64, 48), (2, 2, 48)),
])  # fmt: skip
def test_what_is_summed_over_shares_a_scale(fields, rows, shape, scales):
    weight = normal(*shape)
    found = ScaleConfig(**fields).build().compress("w", weight, rows=rows)
    assert found.scales.shape == scales
    blocks = tuple(n // s for n, s in zip(shape, scales, strict=True))
    steps = np.kron(found.scales.astype(np.float32), np.ones(blocks, np.float32))
    most = 0.6 if found.bits == 8 else 2.6  # float16 rounds products; of 4 bits the largest may be cut off
    assert (np.abs(found.dequantized() - weight) <= most * steps).all()


def test_four_bits_take_the_scale_that_loses_least():
    weight = normal(256, 8)
    found = ScaleConfig(bits=4, block_size=32).build().compress("w", weight)
    plain = np.abs(weight.reshape(8, 32, 8)).max(axis=1) / 7
    rounded = np.rint(weight.reshape(8, 32, 8) / plain[:, None]) * plain[:, None]
    error, simple = (
        np.square(found.dequantized() - weight).sum(),
        np.square(rounded - weight.reshape(8, 32, 8)).sum(),
    )
    assert error < 0.97 * simple


def test_inputs_that_count_more_have_the_smaller_errors():
    weight = normal(64, 256)
    counts = np.where(np.arange(64) % 8 == 0, 100, 1).astype(np.float32)
    importance = Importance(counts, np.ones(256, np.float32))
    build = ScaleConfig(bits=4, block_size=32).build

    def loss(given: Importance | None) -> float:
        return float(
            (counts[:, None] * np.square(build().compress("w", weight, given).dequantized() - weight)).sum()
        )

    assert loss(importance) < 0.95 * loss(None)


def test_zeros_stay_zeros():
    found = ScaleConfig().build().compress("w", np.zeros((4, 4), np.float32))
    assert (found.dequantized() == 0).all()


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(
        QuantizationError, match=r"w is \[40, 8\], whose dim of 40 does not split into blocks of 32"
    ):
        ScaleConfig(block_size=32).build().compress("w", normal(40, 8))
    with pytest.raises(QuantizationError, match="w holds NaN or infinity"):
        ScaleConfig().build().compress("w", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(ConfigError, match=r"bits \(2\) must be one of 4, 8"):
        ScaleConfig(bits=2)
    with pytest.raises(ConfigError, match=r"block_size \(0\) must be at least 1"):
        ScaleConfig(block_size=0)
