"""Arrays in huge pages are the same arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.serve.huge_pages import SIZE, Region, regions, use_huge_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _refused() -> bool:
    return not _SETTING.exists() or "[never]" in _SETTING.read_text()


def test_arrays_are_as_they_were_where_they_were() -> None:
    array = jnp.arange(3 * SIZE // 4, dtype=jnp.int32)  # of 3 huge pages, 2 of which are whole at least
    (region,) = regions([array])
    where = array.unsafe_buffer_pointer()
    assert region.begin % SIZE == 0 and region.size in (2 * SIZE, 3 * SIZE)
    assert where <= region.begin and region.begin + region.size <= where + array.nbytes
    taken = use_huge_pages([region])
    np.testing.assert_array_equal(array, np.arange(array.size))
    assert array.unsafe_buffer_pointer() == where
    if _refused():
        pytest.skip("this system gives no huge pages")
    assert taken == region.size


def test_small_arrays_have_none() -> None:
    assert regions([jnp.zeros(8), jnp.zeros((SIZE - 4096) // 4)]) == []


def test_memory_that_is_gone_is_passed_over() -> None:
    assert use_huge_pages([Region(SIZE, SIZE)]) == 0


def test_all_of_a_tree_of_arrays_is_found() -> None:
    found = regions(jax.tree.leaves({"a": jnp.zeros(SIZE), "b": [jnp.zeros(SIZE), jnp.zeros(1)]}))
    assert len(found) == 2
