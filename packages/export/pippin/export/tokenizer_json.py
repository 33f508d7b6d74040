"""A SentencePiece tokenizer as tokenizer.json, which tokenizers in apps read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pippin.core import manifest
from pippin.core.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_object
from pippin.export.compress.text import evaluation_text

_MODEL, _JSON, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_IDS = "config.json"
_SPACE = "▁"  # what SentencePiece writes for a space
_SAMPLE = 20_000  # characters that both must cut alike
_MORE = "  Übung, 東京 🍎\n\t x=1_000; é"


def write_tokenizer_json(folder: Path) -> bool:
    """Adds tokenizer.json to a folder that has tokenizer.model alone. Whether there is one now.

    Where it would not give the same tokens, it is left out.
    """
    if (folder / _JSON).is_file():
        return True
    if not (folder / _MODEL).is_file():
        return False
    from sentencepiece import sentencepiece_model_pb2 as sp

    model = sp.ModelProto.FromString((folder / _MODEL).read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    own = load_tokenizer(folder)
    text = json.dumps(_tokenizer(model, sp, own), ensure_ascii=False, indent=1) + "\n"
    if not _agree(own, text):
        return False
    manifest.write_file(folder / _JSON, text.encode())
    config = _config(model) | read_tokenizer_object(folder / _CONFIG)
    manifest.write_file(folder / _CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    return True


def write_special_ids(folder: Path) -> None:
    """Adds to a tokenizer's folder the ids of its special tokens, in a config.json, unless it says them.

    Where a model's config.json does not say them, transformers takes those of Llama 2.
    """
    facts = read_tokenizer_object(folder / _IDS)
    if "eos_token_id" in facts:
        return
    tokenizer = load_tokenizer(folder)
    ends = sorted(tokenizer.eos_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    manifest.write_file(folder / _IDS, (json.dumps(ids | facts, indent=1) + "\n").encode())


def _agree(own: Tokenizer, text: str) -> bool:
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(text)
    # Not the whole at once: of a long row of asterisks, several ways to cut it can be equally likely.
    for sample in (*evaluation_text()[:_SAMPLE].splitlines(), _MORE):
        ids = theirs.encode(sample, add_special_tokens=False).ids
        if ids != own.encode(sample) or theirs.decode(ids) != own.decode(ids):
            return False
    return True


def _tokenizer(model: Any, sp: Any, own: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says."""
    piece = sp.ModelProto.SentencePiece
    kinds = {piece.CONTROL: True, piece.UNKNOWN: True, piece.USER_DEFINED: False}
    added = [
        {
            "id": i,
            "content": p.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[p.type],
        }
        for i, p in enumerate(model.pieces)
        if p.type in kinds
    ]
    normalizers: list[dict[str, Any]] = []
    if model.normalizer_spec.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": _SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.normalizer_spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _starts_with([(model.pieces[i].piece, i) for i in own.start_ids]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model) if is_bpe else _unigram(model),
    }


def _starts_with(tokens: list[tuple[str, int]]) -> dict[str, Any] | None:
    """The step that puts the tokens before a text that the model expects there."""
    if not tokens:
        return None

    def text(name: str, number: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": token, "type_id": number}} for token, _ in tokens]
        return [*before, {"Sequence": {"id": name, "type_id": number}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in tokens},
    }


def _bpe(model: Any) -> dict[str, Any]:
    """Merges, which SentencePiece keeps as scores of pieces: whatever two pieces make a third are merged by its score."""
    ids = {p.piece: i for i, p in enumerate(model.pieces)}
    merges = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-model.pieces[i].score, ids[left], ids[right], [left, right]))
    return {
        "type": "BPE",
        "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": ids,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _unigram(model: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": [[p.piece, p.score] for p in model.pieces],
    }


def _config(model: Any) -> dict[str, Any]:
    """What tokenizer_config.json says: the class by which apps read it, and the special tokens."""
    spec = model.trainer_spec
    ids = {
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_id,
        "unk_token": spec.unk_id,
        "pad_token": spec.pad_id,
    }
    tokens = {name: model.pieces[i].piece for name, i in ids.items() if i >= 0}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
