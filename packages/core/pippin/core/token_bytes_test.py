import pytest
from tokenizers import decoders

from pippin.core.errors import DataError
from pippin.core.token_bytes import byte_level_alphabet, bytes_of_token

_LLAMA = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def test_the_alphabet_has_a_character_for_each_byte() -> None:
    assert sorted(byte_level_alphabet().values()) == list(range(256))


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        (decoders.ByteLevel(), "\u0120caf\u00c3\u00a9", " caf\u00e9".encode()),
        (decoders.ByteLevel(), "\u00c3", b"\xc3"),  # half a character
        (decoders.ByteLevel(), "added \u65e5", "added \u65e5".encode()),
        (decoders.Sequence([decoders.ByteLevel()]), "\u010a", b"\n"),
        (_LLAMA, "\u2581caf\u00e9", " caf\u00e9".encode()),
        (_LLAMA, "<0xE2>", b"\xe2"),
        (_LLAMA, "<0xZZ>", b"<0xZZ>"),
        (decoders.Metaspace(), "\u2581a", b" a"),
        (decoders.Metaspace(), "<0xE2>", b"<0xE2>"),
    ],
)
def test_a_token_has_the_bytes_of_its_kind(decoder: object, token: str, expected: bytes) -> None:
    assert bytes_of_token(decoder)(token) == expected


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_tokens_of_other_kinds_have_none(decoder: object) -> None:
    with pytest.raises(DataError, match="token 'a' has no bytes of its own"):
        bytes_of_token(decoder)("a")
