import contextlib
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.errors import CheckpointError, PippinError
from pippin.core.gguf_file import GGUFFile, open_gguf
from pippin.core.gguf_testing import write_gguf
from pippin.core.manifest import DamageError

_METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.size": 7,
    "a.small": np.int8(-3),
    "a.large": np.uint64(1 << 40),
    "a.rate": 1e-5,
    "a.texts": ["one", "", "drei £"],
    "a.numbers": [1, 2, 3],
}


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"x": _values(3, 64), "y": _values(5), "z": _values(2, 3, 32)}
    return write_gguf(tmp_path / "model.gguf", _METADATA, tensors, {"x": "Q4_1", "z": "F16"})


def _use(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        assert tensor.read().shape == tensor.shape


def test_metadata_come_back(path: Path) -> None:
    file = open_gguf(path)
    assert file.text("general.architecture") == "llama"
    assert (file.integer("a.size"), file.integer("a.small"), file.integer("a.large")) == (7, -3, 1 << 40)
    assert file.number("a.rate") == 1e-5  # and not the nearest float32 in 64 bits
    assert file.flag("a.flag") is True
    assert file.texts("a.texts") == ["one", "", "drei £"]
    numbers = file.numbers("a.numbers")
    assert numbers is not None and numbers.tolist() == [1, 2, 3]


def test_what_is_absent_has_a_default_or_an_error(path: Path) -> None:
    file = open_gguf(path)
    assert (file.text("b", "c"), file.integer("b", 0), file.flag("b", False)) == ("c", 0, False)
    assert (file.texts("b"), file.numbers("b")) == ([], None)
    with pytest.raises(CheckpointError, match="its metadata has no b"):
        file.integer("b")


def test_a_value_of_another_kind_is_refused(path: Path) -> None:
    file = open_gguf(path)
    with pytest.raises(CheckpointError, match="a.size is .*; it must be a string"):
        file.text("a.size")
    with pytest.raises(CheckpointError, match="a.numbers is 3 values; it must be one integer"):
        file.integer("a.numbers")
    with pytest.raises(CheckpointError, match="a.rate is .*; it must be one integer"):
        file.integer("a.rate")
    with pytest.raises(CheckpointError, match="must be an array of strings"):
        file.texts("a.numbers")
    with pytest.raises(CheckpointError, match="must be an array of numbers"):
        file.numbers("a.size")


def test_tensors_come_back(path: Path) -> None:
    tensors = open_gguf(path).tensors
    assert {name: t.shape for name, t in tensors.items()} == {"x": (3, 64), "y": (5,), "z": (2, 3, 32)}
    np.testing.assert_array_equal(tensors["y"].read(), _values(5))
    np.testing.assert_array_equal(tensors["z"].read(), _values(2, 3, 32).astype(np.float16))
    np.testing.assert_allclose(tensors["x"].read(), _values(3, 64), atol=0.2)


@pytest.mark.parametrize("kind", ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0"])
def test_types_are_dequantised_as_the_library_does(tmp_path: Path, kind: str) -> None:
    values, number = _values(4, 256), gguf.GGMLQuantizationType[kind]
    file = open_gguf(write_gguf(tmp_path / "model.gguf", {}, {"x": values}, {"x": kind}))
    np.testing.assert_array_equal(
        file.tensors["x"].read(), gguf.dequantize(gguf.quantize(values, number), number)
    )


@contextlib.contextmanager
def _peak_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit


def _header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"x") -> bytes:
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


_LARGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "starts with b''; a GGUF file starts with"),
        (b"PK\3\4 and so on", "a GGUF file starts with"),
        (b"GGUF", "4 bytes of the version"),
        (_header(version=1), "has GGUF version 1; 2 and 3 in little-endian"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
        (_header(keys=_LARGE), "keys are announced at byte 24, and the file has 24 bytes"),
        (_header(tensors=_LARGE), "tensors are announced"),
        (_header(keys=1) + struct.pack("<Q", _LARGE) + bytes(40), "bytes of a key"),
        (_header(keys=1) + _text(b"k") + struct.pack("<IQ", 8, _LARGE), "bytes of k are announced"),
        (_header(keys=1) + _text(b"k") + struct.pack("<IIQ", 9, 8, _LARGE), "strings of k are announced"),
        (_header(keys=1) + _text(b"k") + struct.pack("<IIQ", 9, 0, _LARGE), "bytes of k are announced"),
        (_header(keys=1) + _text(b"k") + struct.pack("<IIQ", 9, 9, 1), "k is of type 9"),
        (_header(keys=1) + _text(b"k") + struct.pack("<IQ", 77, 1), "k is of type 77"),
        (_header(keys=1) + _text(b"\xff") + struct.pack("<IQ", 4, 1), "is no UTF-8"),
        (_header(keys=2) + 2 * (_text(b"k") + struct.pack("<II", 4, 1)), "the key 'k' is there twice"),
        (_header(keys=1) + _text(b"general.alignment") + struct.pack("<II", 4, 3), "must be a power of two"),
        (_header(tensors=1) + _tensor((4,)) + bytes(8), "ends at byte .*: it was cut short"),
        (_header(tensors=1) + _tensor((_LARGE,) * 4), "it was cut short"),
        (_header(tensors=1) + _tensor((0,)), "dims are positive"),
        (_header(tensors=1) + _tensor(()) + bytes(32), "has 0 dims; 1 to 4"),
        (_header(tensors=1) + _tensor((1,) * 5), "has 5 dims; 1 to 4"),
        (_header(tensors=1) + _tensor((33,), kind=8), "the first of Q8_0 is a multiple of 32"),
        (_header(tensors=1) + _tensor((4,), kind=99), "is of type 99; .* Get the model in one of these"),
        (_header(tensors=1) + _tensor((4,), kind=24), "is of type I8"),
        (_header(tensors=1) + _tensor((4,), offset=_LARGE), "it was cut short"),
        (_header(tensors=2) + 2 * _tensor((4,)) + bytes(64), "two tensors have the same name"),
        (
            _header(tensors=2) + _tensor((4,)) + _tensor((4,), name=b"y") + bytes(64),
            "tensor 'y' starts inside the one before it",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_as_it_says_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem), _peak_below(1 << 20):
        open_gguf(tmp_path / "x.gguf")


def test_a_file_that_is_absent_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"absent.gguf cannot be read: No such file .* Give a .gguf file"
    ):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        open_gguf(tmp_path)


def test_a_file_that_shrinks_later_is_damaged(path: Path) -> None:
    file = open_gguf(path)
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - 40)
    with pytest.raises(DamageError, match="tensor 'z': .* of its 384 bytes are there"):
        _use(file)


def test_no_file_cut_short_is_read(path: Path) -> None:
    content = path.read_bytes()
    used = len(content) - 32  # the last bytes may be padding
    for size in range(used):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_flipped_bytes_give_our_errors_or_other_values(path: Path) -> None:
    content = path.read_bytes()
    flips = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=3)

    @given(flips)
    @settings(max_examples=500, deadline=2000)
    def check(flips: list[tuple[int, int]]) -> None:
        damaged = bytearray(content)
        for place, bits in flips:
            damaged[place] ^= bits
        path.write_bytes(damaged)
        try:
            _use(open_gguf(path))
        except PippinError as e:
            assert str(path) in str(e)

    with _peak_below(64 << 20):
        check()
