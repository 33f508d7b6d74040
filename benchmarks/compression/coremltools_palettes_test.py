"""The peer's tables are those of coremltools, and fit our arrays."""

import numpy as np
import pytest

from benchmarks.compression.coremltools_palettes import GROUP, kmeans, palettes


# coremltools leaves the folders of its models to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_each_group_of_outputs_has_a_table_and_each_weight_its_nearest_entry():
    rng = np.random.default_rng(0)
    # Few different values for each group, so that four entries hold them all.
    values = rng.normal(size=(2, 4)).astype(np.float16).astype(np.float32)
    wide = np.repeat(values, GROUP, axis=0)[:, rng.integers(0, 4, 8)].T
    found = palettes({"a.weight": wide, "b.weight": wide[:, :GROUP]}, 2, kmeans)
    assert found["a.weight"].groups == (1, 2)
    # Float16 holds the values; k-means finds them to its own tolerance.
    np.testing.assert_allclose(found["a.weight"].dequantized(), wide, atol=1e-3)
    np.testing.assert_allclose(found["b.weight"].dequantized(), wide[:, :GROUP], atol=1e-3)
