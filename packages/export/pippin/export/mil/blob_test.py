"""Weight files: what coremltools' own writer wrote is read as it was, and damage is named."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.export.coreml_tools import Builder as mb
from pippin.export.mil import dtypes
from pippin.export.mil.blob import BlobFile
from pippin.export.mil.errors import PackageError
from pippin.export.mil.program import BlobPlace
from pippin.export.mil.spec import load_program
from pippin.export.mil.testing import save_package, sub_byte, tensor

_RNG = np.random.default_rng(0)
_META = 64  # where the first blob's metadata lies


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """One array of each type, of an odd length, so that bits are left over."""
    return {
        "float16": _RNG.normal(size=37).astype(np.float16),
        "float32": _RNG.normal(size=37).astype(np.float32),
        "int32": _RNG.integers(-(2**31), 2**31, 37).astype(np.int32),
        "int16": _RNG.integers(-(2**15), 2**15, 37).astype(np.int16),
        "uint16": _RNG.integers(0, 2**16, 37).astype(np.uint16),
        "int8": _RNG.integers(-128, 128, 37).astype(np.int8),
        "uint8": _RNG.integers(0, 256, 37).astype(np.uint8),
    }


def test_whole_bytes_are_read_as_coremltools_wrote_them(tmp_path, arrays):
    def body(x):
        return [x, *(mb.const(val=a, name=f"const_{name}") for name, a in arrays.items())][:1]

    program = load_program(
        save_package(tmp_path / "p.mlpackage", {"main": ({"x": tensor("float16", 2)}, body)})
    )
    constants = program.functions["main"].constants
    for name, array in arrays.items():
        place = constants[f"const_{name}"].value
        assert isinstance(place, BlobPlace)
        file = program.weight_files[place.file]
        np.testing.assert_array_equal(file.read(file.blob(place.offset)), array)
    assert len(list(file.blobs())) == len(arrays)


def test_less_than_a_byte_is_read_as_coremltools_wrote_it(tmp_path):
    written = {}
    for name in ("uint1", "uint2", "uint3", "uint4", "uint6", "int4"):
        low = -8 if name == "int4" else 0
        for count in (37, 64):
            written[name, count] = _RNG.integers(low, low + (1 << dtypes.BY_NAME[name].bits), count)

    def body(x):
        for (name, _), values in written.items():
            packed = sub_byte(values, name)
            if name == "int4":
                made = mb.constexpr_blockwise_shift_scale(data=packed, scale=np.ones(1, np.float16))
            else:
                entries = 1 << dtypes.BY_NAME[name].bits
                made = mb.constexpr_lut_to_dense(indices=packed, lut=np.zeros((1, entries, 1), np.float16))
            x = mb.add(x=x, y=mb.reduce_sum(x=made, axes=[0], keep_dims=True))
        return x

    path = save_package(tmp_path / "p.mlpackage", {"main": ({"x": tensor("float16", 1)}, body)})
    program = load_program(path)
    (file,) = program.weight_files.values()
    found = {(b.dtype.name, b.count): b for b in map(file.blob, (place.offset for place in program.blobs))}
    for key, values in written.items():
        np.testing.assert_array_equal(file.read(found[key]), values)


@given(st.sampled_from(["uint1", "uint2", "uint3", "uint4", "uint6", "int4"]), st.data())
def test_bits_are_unpacked_from_the_lowest_up(name, data):
    dtype = dtypes.BY_NAME[name]
    low = -8 if name == "int4" else 0
    values = data.draw(st.lists(st.integers(low, low + (1 << dtype.bits) - 1), max_size=70))
    number = sum((v & (1 << dtype.bits) - 1) << (i * dtype.bits) for i, v in enumerate(values))
    packed = number.to_bytes(dtypes.stored_bytes(dtype, len(values)), "little")
    assert dtypes.decode(packed, dtype, len(values)).tolist() == values


def test_bfloat16_is_the_upper_half_of_float32():
    values = np.float32([1.5, -2.0, 3e38])
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    want = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(dtypes.decode(halves, dtypes.BY_NAME["bfloat16"], 3), want)


def blob_file(
    path: Path,
    *,
    count=1,
    version=2,
    sentinel=0xDEADBEEF,
    code=1,
    size=8,
    data=128,
    padding=0,
    values=b"12345678",
) -> Path:
    """A file of one blob, as told, false as that may be."""
    header = struct.pack("<II56x", count, version)
    path.write_bytes(header + struct.pack("<IIQQQ32x", sentinel, code, size, data, padding) + values)
    return path


def test_a_file_that_is_right_is_read(tmp_path):
    file = BlobFile(blob_file(tmp_path / "weight.bin"))
    assert [b.count for b in file.blobs()] == [4]
    assert file.read(file.blob(_META)).tobytes() == b"12345678"


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"version": 1}, "is of version 1, not 2"),
        ({"sentinel": 0xDEADBEEE}, "it starts with 0xdeadbeee, not 0xdeadbeef"),
        ({"code": 99}, "of an unknown type, 99; known are 1 .float16."),
        ({"size": 9}, "of 9 bytes, of which only 8 are in the file"),
        ({"size": 2**63}, "of which only 8 are in the file"),
        ({"size": 7}, "no whole number of float16"),
        ({"padding": 9}, "9 bits of padding"),
        ({"data": 0}, "data is said to be at 0, not behind its metadata"),
        ({"data": 2**64 - 1}, "not behind its metadata"),
        ({"count": 2}, "has no blob at 192"),
        ({"count": 0}, "has 0 blobs that end at 64 by its header, and 136 bytes"),
        ({"values": b""}, "of which only 0 are in the file"),
    ],
)
def test_lies_are_refused(tmp_path, lie, message):
    with pytest.raises(PackageError, match=message):
        list(BlobFile(blob_file(tmp_path / "weight.bin", **lie)).blobs())


@pytest.mark.parametrize("offset", [0, 63, 65, 128, 2**63])
def test_an_offset_without_a_blob_is_refused(tmp_path, offset):
    file = BlobFile(blob_file(tmp_path / "weight.bin"))
    with pytest.raises(PackageError, match=f"has no blob at {offset}"):
        file.blob(offset)


def test_a_file_that_is_empty_or_absent_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for name in ("empty", "absent"):
        with pytest.raises(PackageError, match="cannot be read"):
            BlobFile(tmp_path / name)
    (tmp_path / "short").write_bytes(b"x" * 63)
    with pytest.raises(PackageError, match="has 63 bytes, less than its header"):
        BlobFile(tmp_path / "short")


def test_no_flipped_byte_does_more_than_change_values_or_be_refused(tmp_path):
    whole = blob_file(tmp_path / "weight.bin").read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        (tmp_path / "damaged.bin").write_bytes(damaged)
        try:
            file = BlobFile(tmp_path / "damaged.bin")
            blobs = list(file.blobs())
        except PackageError:
            assert at < 128
        else:
            # The type's number, if it is that of another type of as many bytes; or the values.
            assert at >= 128 or (at == 68 and blobs[0].dtype.name != "float16"), at


def test_a_file_that_was_cut_anywhere_is_refused(tmp_path):
    whole = blob_file(tmp_path / "weight.bin").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.bin").write_bytes(whole[:size])
        with pytest.raises(PackageError, match=r"weight file .*cut\.bin"):
            list(BlobFile(tmp_path / "cut.bin").blobs())
