"""Tests of palettes: whose weights share a table, what counts, and what is refused."""

import numpy as np
import pytest

from pippin.core.errors import ConfigError, QuantizationError
from pippin.export.compress.config import GroupAxis, PaletteConfig
from pippin.export.compress.palettize import Importance, Palettizer


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(weight: np.ndarray, **fields) -> float:
    error = PaletteConfig(**fields).build().compress("w", weight).dequantized() - weight
    return float(np.sqrt((error**2).mean() / (weight**2).mean()))


@pytest.mark.parametrize("axis, grid", [(GroupAxis.OUTPUTS, (1, 3)), (GroupAxis.INPUTS, (4, 1))])
def test_groups_of_neighbours_share_a_table(axis, grid):
    weight = normal(64, 48)
    blocks = weight.reshape(grid[0], 64 // grid[0], grid[1], 48 // grid[1])
    blocks += 100 * np.arange(grid[0] * grid[1]).reshape(grid[0], 1, grid[1], 1)  # each around another number
    found = PaletteConfig(bits=3, axis=axis).build().compress("w", blocks.reshape(64, 48))
    assert found.groups == grid
    np.testing.assert_allclose(found.dequantized(), weight, atol=2.5)
    means = found.luts.astype(np.float32).mean(axis=-1).ravel()
    np.testing.assert_allclose(means, 100 * np.arange(means.size), atol=2)


def test_each_matrix_of_a_stack_has_tables_of_its_own():
    weight = normal(2, 3, 32, 16)
    found = PaletteConfig(bits=2).build().compress("w", weight)
    assert found.groups == (2, 3, 1, 1)
    alone = PaletteConfig(bits=2).build().compress("w", weight[1, 2])
    np.testing.assert_array_equal(found.luts[1, 2], alone.luts)
    np.testing.assert_array_equal(found.indices[1, 2], alone.indices)


@pytest.mark.parametrize(
    "bits, most", [(1, 0.61), (2, 0.345), (3, 0.187), (4, 0.098), (6, 0.026), (8, 0.0069)]
)
def test_normal_weights_lose_what_the_best_quantiser_loses(bits, most):
    # Max 1960, IRE Trans. Inf. Theory 6(1), table 1: 0.6028, 0.3428, 0.1856, 0.0975 for 1 to 4 bits.
    assert relative_error(normal(512, 32), bits=bits) < most


def test_every_index_is_of_the_nearest_entry():
    weight = normal(128, 16)
    found = PaletteConfig(bits=4).build().compress("w", weight)
    table = found.luts[0, 0].astype(np.float32)
    distance = np.abs(weight[..., None] - table)
    chosen = np.take_along_axis(distance, found.indices[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(axis=-1), atol=1e-6)


def test_errors_move_to_where_they_count_less():
    weight, rng = normal(256, 32), np.random.default_rng(1)
    importance = Importance(
        rng.gamma(0.2, size=256).astype(np.float32), rng.gamma(0.5, size=32).astype(np.float32)
    )
    counts = importance.inputs[:, None] * importance.outputs[None]
    build = PaletteConfig(bits=3).build

    def loss(given: Importance | None) -> float:
        return float((counts * (build().compress("w", weight, given).dequantized() - weight) ** 2).sum())

    assert loss(importance) < 0.93 * loss(None)
    told = build().distortions("w", weight, importance, (2, 3, 6, 8))
    np.testing.assert_allclose(told[1], loss(importance), rtol=0.01)
    assert told[0] > told[1] > told[2] == 16 * told[3]


def test_nbytes_are_what_a_weight_takes():
    for cfg in (PaletteConfig(bits=3), PaletteConfig(bits=6, axis=GroupAxis.INPUTS, group_size=8)):
        palettizer, weight = cfg.build(), normal(2, 32, 48)
        assert isinstance(palettizer, Palettizer)
        assert palettizer.compress("w", weight).nbytes == palettizer.nbytes(weight.shape, cfg.bits)


def test_the_same_weights_give_the_same_bytes():
    weight = normal(700, 160)
    first, second = (PaletteConfig().build().compress("w", weight) for _ in range(2))
    np.testing.assert_array_equal(first.luts, second.luts)
    np.testing.assert_array_equal(first.indices, second.indices)


def _with(value: float) -> np.ndarray:
    weight = normal(32, 32)
    weight[3, 4] = value
    return weight


@pytest.mark.parametrize("weight, fields, message", [
    (normal(32, 40), {}, r"head.weight is \[32, 40\], whose outputs \(40\) do not split into groups of 16. Take a"),
    (normal(40, 32), {"axis": GroupAxis.INPUTS}, r"whose inputs \(40\) do not split"),
    (_with(np.nan), {}, "head.weight holds NaN or infinity; what is exported is finite"),
    (_with(np.inf), {}, "head.weight holds NaN or infinity"),
    (_with(-70000.0), {}, "head.weight holds numbers from -70000.0 to .* 65504.0 at most"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(weight, fields, message):
    with pytest.raises(QuantizationError, match=message):
        PaletteConfig(**fields).build().compress("head.weight", weight)


@pytest.mark.parametrize("fields, message", [
    ({"bits": 5}, r"bits \(5\) must be one of 1, 2, 3, 4, 6, 8"),
    ({"group_size": 0}, r"group_size \(0\) must be at least 1"),
])  # fmt: skip
def test_configs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PaletteConfig(**fields)
