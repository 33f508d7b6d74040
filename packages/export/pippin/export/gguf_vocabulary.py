"""A tokenizer's files as the metadata of a GGUF file: the way back from `pippin.core.gguf_tokenizer`. No JAX.

A GGUF file tells how text is split before BPE by a name alone, so a tokenizer.json
that splits in a way that has no name is refused: any other name would give other
ids than the model was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pippin.core.chat_template import chat_template_source
from pippin.core.errors import ConfigError
from pippin.core.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    takes_whole_words,
    ways_to_split,
)
from pippin.core.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_object, token_text

_JSON, _MODEL = "tokenizer.json", "tokenizer.model"
_BPE, _UNIGRAM = 2, 1  # of SentencePiece

# What a byte-level tokenizer.json may say of its model beside tokens and merges, and means nothing.
_PLAIN_BPE: dict[str, Any] = {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
}


def vocabulary_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in a directory: key -> str, bool, int, list or array.

    Args:
        directory: of its files.
        vocab_size: of the model. Ids that no token has are filled up.

    Raises:
        ConfigError: GGUF cannot express the tokenizer, or it has more tokens than the model.
        DataError: there is none, or it is damaged.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, and the model {vocab_size}. They belong to "
            "different models: give the model with its own tokenizer."
        )
    raw = read_tokenizer_object(directory / _JSON)
    if raw and (_is_byte_level(raw) or not (directory / _MODEL).is_file()):
        keys, ids = _byte_level(directory, raw, vocab_size)
    else:
        keys, ids = _sentencepiece(directory, vocab_size)
    keys |= _special(directory, tokenizer, ids)
    if template := chat_template_source(directory):
        keys["tokenizer.chat_template"] = template
    return keys


def _special(directory: Path, tokenizer: Tokenizer, ids: dict[str, int]) -> dict[str, Any]:
    """The special tokens, by the names of GGUF."""
    config = read_tokenizer_object(directory / "tokenizer_config.json")
    named = {name: ids.get(token_text(config.get(f"{name}_token")) or "") for name in ("unk", "pad")}
    # A model without a token for the start of a text may be started by another.
    first = tokenizer.start_ids[0] if tokenizer.start_ids else tokenizer.bos_id
    others = [i for i in sorted(tokenizer.eos_ids) if i != tokenizer.eos_id]
    found = {
        "bos": first,
        "eos": tokenizer.eos_id,
        "unknown": named["unk"] if named["unk"] is not None else ids.get("<unk>"),
        "padding": named["pad"] if named["pad"] is not None else ids.get("<pad>"),
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": i for name, i in found.items() if i is not None
    }
    return keys | {
        "tokenizer.ggml.add_bos_token": bool(tokenizer.start_ids),
        "tokenizer.ggml.add_eos_token": False,
    }


def _byte_level(
    directory: Path, raw: dict[str, Any], vocab_size: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """The keys of a byte-level BPE, and its tokens' ids."""
    path = directory / _JSON
    way, model = _way_to_split(path, raw), raw["model"]
    for name, plain in _PLAIN_BPE.items():
        if (got := model.get(name)) not in (None, plain, ""):
            raise ConfigError(
                f"{path}: model.{name} is {got!r}, which GGUF cannot express: it must be {plain!r}. Use another format."
            )
    if bool(model.get("ignore_merges")) != takes_whole_words(way):
        raise ConfigError(
            f"{path}: model.ignore_merges is {model.get('ignore_merges')}; where text is split as {way!r} does, GGUF means "
            f"{takes_whole_words(way)}. Use another format."
        )
    ids: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in raw.get("added_tokens") or ()}
    ids |= {content: token["id"] for content, token in added.items()}
    tokens, types = _unused(vocab_size)
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
        if token in added:
            types[i] = CONTROL if added[token]["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": way,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }, ids


def _is_byte_level(raw: dict[str, Any]) -> bool:
    model = raw.get("model") or {}
    steps = _canonical(raw.get("pre_tokenizer"))
    return model.get("type") == "BPE" and any(step["type"] == "ByteLevel" for step in steps)


def _way_to_split(path: Path, raw: dict[str, Any]) -> str:
    """The name that GGUF has for how a tokenizer.json splits text."""
    if not _is_byte_level(raw):
        kind = (raw.get("model") or {}).get("type")
        raise ConfigError(
            f"{path}: the tokenizer is of kind {kind!r} without a ByteLevel step; GGUF files are written with a byte-level "
            f"BPE, or with SentencePiece's BPE from a {_MODEL}. Put that beside it, or use another format."
        )
    normalizer, steps = _canonical(raw.get("normalizer")), _canonical(raw.get("pre_tokenizer"))
    for name, way in ways_to_split().items():
        if (normalizer, steps) == (_canonical(way["normalizer"]), _canonical(way["pre_tokenizer"])):
            return name
    raise ConfigError(
        f"{path}: it normalises and splits text by {json.dumps([*normalizer, *steps])[:400]}, for which GGUF has no name "
        f"that is known here; {', '.join(ways_to_split())} are. Use another format."
    )


def _canonical(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Steps that do the same, written the same: a list of those that are within each other, of what they do."""
    if not step:
        return []
    if step["type"] == "Sequence":
        parts = step.get("pretokenizers") or step.get("normalizers") or []
        return [canonical for part in parts for canonical in _canonical(part)]
    if step["type"] == "ByteLevel":  # trim_offsets only says where tokens are
        return [
            {
                "type": "ByteLevel",
                "add_prefix_space": bool(step.get("add_prefix_space", True)),
                "use_regex": bool(step.get("use_regex", True)),
            }
        ]
    return [step]


def _sentencepiece(directory: Path, vocab_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The keys of a SentencePiece BPE, and its pieces' ids."""
    from sentencepiece import sentencepiece_model_pb2 as sp

    path = directory / _MODEL
    model = sp.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kind = {_BPE: "BPE", _UNIGRAM: "unigram"}.get(trainer.model_type, f"{trainer.model_type}")
    for name, got, wanted in (
        ("model_type", kind, "BPE"),
        ("byte_fallback", trainer.byte_fallback, True),
        ("precompiled_charsmap", len(normalizer.precompiled_charsmap), 0),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
    ):
        if got != wanted:
            raise ConfigError(
                f"{path}: {name} is {got}, which GGUF cannot express: it must be {wanted}. Use another format."
            )
    tokens, types = _unused(vocab_size)
    scores = np.full(vocab_size, -10_000.0, np.float32)
    for i, piece in enumerate(model.pieces):
        tokens[i], types[i], scores[i] = piece.piece, piece.type, piece.score
    assert BYTE in types, "byte fallback without bytes"
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.add_dummy_prefix),
    }, {piece.piece: i for i, piece in enumerate(model.pieces)}


def _unused(count: int) -> tuple[list[str], np.ndarray]:
    """A vocabulary of tokens that nobody uses, and their types."""
    return [f"[PAD{i}]" for i in range(count)], np.full(count, UNUSED, np.int32)
