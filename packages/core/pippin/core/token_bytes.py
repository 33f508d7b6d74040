"""The bytes that a token of a `tokenizer.json` stands for, by the kind of its decoder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from pippin.core.errors import DataError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # and a byte like this


def bytes_of_token(decoder: Any) -> Callable[[str], bytes]:
    """From a token as the vocabulary spells it to its bytes.

    What is returned raises `DataError` where the decoder is neither byte-level nor of SentencePiece's kind.

    Args:
        decoder: of a Hugging Face tokenizer; None where it has none.
    """
    state = json.loads(decoder.__getstate__()) if decoder else {}  # the decoder as tokenizer.json has it
    kinds = {part["type"] for part in state.get("decoders", [state]) if "type" in part}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"Metaspace", "ByteFallback"}:
        return functools.partial(_piece, fallback="ByteFallback" in kinds)
    return _refuse


def _byte_level(token: str) -> bytes:
    table = byte_level_alphabet()
    try:
        return bytes([table[c] for c in token])
    except KeyError:  # a token that was added after training is spelt as it is
        return token.encode()


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte: printable bytes of Latin-1 are themselves, and the others the characters from U+0100 on.

    Source: Radford et al. 2019 (GPT-2), section 2.2, and the encoder that was published with it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _piece(token: str, fallback: bool) -> bytes:
    if fallback and (byte := _BYTE.fullmatch(token)):
        return bytes.fromhex(byte[1])
    return token.replace(SPACE_MARK, " ").encode()


def _refuse(token: str) -> bytes:
    raise DataError(
        f"token {token!r} has no bytes of its own: the tokenizer's decoder is neither byte-level nor of "
        "SentencePiece's kind. Choose a model with such a tokenizer."
    )
