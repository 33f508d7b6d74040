"""Compressed constants, as coremltools writes them, against the definition written out value by value."""

from functools import partial

import numpy as np
import pytest

from pippin.export.coreml_tools import Builder as mb
from pippin.export.mil import ops_constexpr
from pippin.export.mil.errors import PackageError
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.spec import load_program
from pippin.export.mil.testing import save_package, sub_byte, tensor

_RNG = np.random.default_rng(0)


def materialised(folder, makers) -> list[np.ndarray]:
    """What a package holds for the constants that `makers` emit, in both modes, which agree."""

    def body(x):
        return [mb.mul(x=x, y=make(), name=f"out_{i}") for i, make in enumerate(makers)]

    program = load_program(
        save_package(folder / "p.mlpackage", {"main": ({"x": tensor("float16", 1)}, body)})
    )
    one = {"x": np.ones(1, np.float16)}
    half, exact = (Interpreter(program, mode).run("main", one, {}) for mode in Mode)
    for name, values in half.items():
        np.testing.assert_array_equal(values.astype(np.float64), exact[name])
    return [half[f"out_{i}"] for i in range(len(makers))]


def looked_up(indices: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """The definition, one value after the other."""
    result = np.empty(indices.shape, lut.dtype)
    for at in np.ndindex(indices.shape):
        group = tuple(i * g // n for i, g, n in zip(at, lut.shape, indices.shape, strict=False))
        result[at] = lut[group][indices[at], 0]
    return result


def test_tables_of_groups_of_rows_columns_or_both(tmp_path):
    makers, wanted = [], []
    for bits in (1, 2, 3, 4, 6, 8):
        for groups in ((1, 1), (4, 1), (1, 3), (2, 3), (8, 6)):
            indices = _RNG.integers(0, 1 << bits, (8, 6)).astype(np.uint8)
            lut = _RNG.normal(size=(*groups, 1 << bits, 1)).astype(np.float16)
            packed = indices if bits == 8 else sub_byte(indices, f"uint{bits}")
            makers.append(partial(mb.constexpr_lut_to_dense, indices=packed, lut=lut))
            wanted.append(looked_up(indices, lut))
    for got, want in zip(materialised(tmp_path, makers), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_slabs_do_not_show(monkeypatch):
    indices = _RNG.integers(0, 4, (12, 6)).astype(np.uint8)
    lut = _RNG.normal(size=(2, 3, 4, 1)).astype(np.float32)
    given = {"indices": Tensor(indices, "uint2"), "lut": Tensor(lut, "float16")}
    monkeypatch.setattr(ops_constexpr, "_SLAB_VALUES", 24)  # four of the six rows of a group
    got = RULES["constexpr_lut_to_dense"].function(**given).values
    np.testing.assert_array_equal(got, looked_up(indices, lut))


@pytest.mark.parametrize("axis", [0, 1])
def test_tables_of_vectors(tmp_path, axis):
    indices = _RNG.integers(0, 4, (4, 6))
    lut = _RNG.normal(size=(1, 1, 4, 2)).astype(np.float16)
    packed = sub_byte(indices, "uint2")
    make = partial(mb.constexpr_lut_to_dense, indices=packed, lut=lut, vector_axis=np.int32(axis))
    (got,) = materialised(tmp_path, [make])
    want = np.empty([n * 2 if i == axis else n for i, n in enumerate(indices.shape)], np.float16)
    for at in np.ndindex(want.shape):
        inner = tuple(i // 2 if d == axis else i for d, i in enumerate(at))
        want[at] = lut[0, 0, indices[inner], at[axis] % 2]
    np.testing.assert_array_equal(got, want)


def test_scales_of_blocks(tmp_path):
    makers, wanted = [], []
    for name, half in (("int8", 128), ("int4", 8)):
        stored = partial(sub_byte, dtype="int4") if name == "int4" else np.asarray
        for blocks in ((1, 1), (4, 1), (4, 3), (2, 6)):
            values = _RNG.integers(-half, half, (4, 6)).astype(np.int8)
            scale = _RNG.uniform(0.01, 0.1, blocks).astype(np.float16)
            offset = _RNG.integers(-3, 3, blocks).astype(np.int8)
            ones = np.ones([n // b for n, b in zip(values.shape, blocks, strict=True)])
            wide = np.kron(scale.astype(np.float64), ones)
            data = {"data": stored(values), "scale": scale}
            makers.append(partial(mb.constexpr_blockwise_shift_scale, **data))
            wanted.append((values * wide).astype(np.float16))
            makers.append(partial(mb.constexpr_blockwise_shift_scale, **data, offset=stored(offset)))
            wanted.append(((values - np.kron(offset, ones)) * wide).astype(np.float16))
    for got, want in zip(materialised(tmp_path, makers), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_values_behind_a_mask(tmp_path):
    mask = _RNG.integers(0, 2, (5, 7))
    values = _RNG.normal(size=mask.sum()).astype(np.float16)
    packed = sub_byte(mask, "uint1")
    (got,) = materialised(tmp_path, [partial(mb.constexpr_sparse_to_dense, nonzero_data=values, mask=packed)])
    want = np.zeros(mask.shape, np.float16)
    want[mask == 1] = values
    np.testing.assert_array_equal(got, want)


def test_groups_that_do_not_divide_are_refused():
    indices, lut = Tensor(np.zeros((4, 6), np.uint8), "uint2"), Tensor(np.zeros((3, 1, 4, 1)), "float16")
    with pytest.raises(PackageError, match=r"\[3, 1\] groups do not divide values of the shape \[4, 6\]"):
        RULES["constexpr_lut_to_dense"].function(indices, lut)


def test_a_table_of_too_few_entries_is_refused():
    indices, lut = Tensor(np.zeros((4, 6), np.uint8), "uint4"), Tensor(np.zeros((1, 1, 4, 1)), "float16")
    with pytest.raises(PackageError, match="an entry for each index"):
        RULES["constexpr_lut_to_dense"].function(indices, lut)


def test_a_mask_of_other_length_is_refused():
    values, mask = Tensor(np.zeros(3), "float16"), Tensor(np.ones((2, 2), np.uint8), "uint1")
    with pytest.raises(PackageError, match="its mask has 4 ones for 3 values"):
        RULES["constexpr_sparse_to_dense"].function(values, mask)
