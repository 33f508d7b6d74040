"""Tests of compressed arrays: what they stand for, how they are packed, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.core.errors import QuantizationError
from pippin.core.quantized_array import PALETTE_BITS, Palettized, Scaled, pack, packed_bytes, unpack


@pytest.mark.parametrize("bits, values, packed", [
    (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], [0b1101, 0b1]),
    (2, [1, 2, 3, 0, 3], [0b00111001, 0b11]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
    (4, [1, 15, 8], [0xF1, 0x08]),
    (6, [1, 2, 63, 32], [0b10000001, 0b11110000, 0b10000011]),
    (8, [7, 255], [7, 255]),
])  # fmt: skip
def test_integers_lie_end_to_end_from_the_lowest_bit(bits, values, packed):
    values = np.array(values, np.uint8)
    np.testing.assert_array_equal(pack(values, bits), np.array(packed, np.uint8))
    np.testing.assert_array_equal(unpack(np.array(packed, np.uint8), bits, values.shape), values)


def test_negative_numbers_are_packed_as_twos_complement():
    values = np.array([[-8, 7], [-1, 0]], np.int8)
    np.testing.assert_array_equal(pack(values, 4), [0x78, 0x0F])
    unpacked = unpack(pack(values, 4), 4, (2, 2), signed=True)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, values)


@given(st.integers(1, 8), st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_what_was_packed_is_unpacked(bits, rows, columns, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (packed_bytes(values.size, bits),)
    np.testing.assert_array_equal(unpack(packed, bits, values.shape), values)


@pytest.mark.parametrize("bits", PALETTE_BITS)
def test_packing_in_parts_leaves_no_seam(bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (1 << 20) + 13).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits, values.shape), values)


@pytest.mark.parametrize("bits", PALETTE_BITS)
def test_a_palette_gives_each_block_its_own_table(bits):
    rng = np.random.default_rng(bits)
    luts = rng.normal(size=(2, 3, 2**bits)).astype(np.float16)
    indices = rng.integers(0, 2**bits, (4, 6)).astype(np.uint8)
    array = Palettized(indices, luts, bits)
    expected = [[luts[i // 2, j // 2, indices[i, j]] for j in range(6)] for i in range(4)]
    values = array.dequantized()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array(expected, np.float32))
    assert array.shape == (4, 6)
    assert array.groups == (2, 3)
    assert array.nbytes == 3 * bits + 2 * 6 * 2**bits
    assert array.bits_per_weight == array.nbytes * 8 / 24


def test_scaled_integers_are_rounded_to_float16():
    scales = np.array([[0.1, 0.3], [1.0, 0.0]], np.float16)
    values = np.array([[-127, 3, 5, 7], [1, 2, 3, 127]], np.int8)
    array = Scaled(values, scales, 8)
    expected = (values.astype(np.float64) * np.repeat(scales.astype(np.float64), 2, axis=1)).astype(
        np.float16
    )
    np.testing.assert_array_equal(array.dequantized(), expected.astype(np.float32))
    assert array.nbytes == 8 + 8
    assert Scaled(np.array([[-8, 7]], np.int8), np.ones((1, 1), np.float16), 4).nbytes == 1 + 2


_INDICES, _LUTS = np.zeros((4, 6), np.uint8), np.zeros((2, 1, 4), np.float16)
_VALUES, _SCALES = np.zeros((4, 6), np.int8), np.ones((4, 1), np.float16)


@pytest.mark.parametrize("make, message", [
    (lambda: Palettized(_INDICES, _LUTS, 5), r"bits \(5\) must be one of 1, 2, 3, 4, 6, 8"),
    (lambda: Palettized(_INDICES.astype(np.int32), _LUTS, 2), "indices are int32.*must be uint8"),
    (lambda: Palettized(_INDICES, _LUTS.astype(np.float32), 2), "luts are float32.*must be float16"),
    (lambda: Palettized(_INDICES[:0], _LUTS, 2), "at least one"),
    (lambda: Palettized(_INDICES, _LUTS[:, :, :3], 2), "luts have 3 entries; at 2 bits they have 4"),
    (lambda: Palettized(_INDICES, np.zeros((3, 1, 4), np.float16), 2), r"\[3, 1\].*\[4, 6\].*must divide"),
    (lambda: Palettized(_INDICES, np.zeros((2, 4), np.float16), 2), r"grid of \[2\] blocks"),
    (lambda: Palettized(_INDICES + np.uint8(4), _LUTS, 2), "an index is 4; at 2 bits the last entry.* 3"),
    (lambda: Palettized(_INDICES, _LUTS + np.float16(np.nan), 2), "luts hold NaN or infinity"),
    (lambda: Scaled(_VALUES, _SCALES, 2), r"bits \(2\) must be one of 4, 8"),
    (lambda: Scaled(_VALUES + np.int8(8), _SCALES, 4), "from 8 to 8; at 4 bits they are from -8 to 7"),
    (lambda: Scaled(_VALUES, _SCALES[:3], 8), "must divide the dim"),
    (lambda: Scaled(_VALUES, -_SCALES, 8), "scales are from -1.0 to -1.0; they are from 0"),
    (lambda: Scaled(_VALUES, _SCALES * np.float16(600), 8), "float16 has every product"),
    (lambda: Scaled(_VALUES, _SCALES * np.float16(np.inf), 8), "scales hold NaN or infinity"),
    (lambda: unpack(np.zeros(3, np.uint8), 3, (9,)), r"uint8\[3\]; 9 of 3 bits are uint8\[4\]"),
    (lambda: unpack(np.array([0, 0, 0, 255], np.uint8), 3, (9,)), "of which 3 bits are used; the others are 0"),
])  # fmt: skip
def test_parts_that_make_no_weight_are_refused(make, message):
    with pytest.raises(QuantizationError, match=message):
        make()
