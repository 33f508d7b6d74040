"""The tokenizer that a GGUF file carries, as the files that `load_tokenizer` and `load_chat_template` open. No JAX.

Byte-level BPE ("gpt2") becomes a tokenizer.json, and SentencePiece ("llama") a
tokenizer.model. A file tells how text is split before BPE only by a name, so
each name that is known is written down here, and any other is refused: a guess
would give other ids than the model was trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pippin.core.atomic_file import write_atomic
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, as in SentencePiece
_TYPES = range(1, 7)

_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
}  # tokenizer_config.json's name -> theirs
_TURN_ENDS = ("eos", "eot", "eom")

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(file: GGUFFile, cache_dir: Path) -> Path | None:
    """The folder of the file's tokenizer, below a cache directory and named for its content; None if it has none.

    Files that are there already are compared, and written again where they differ.

    Raises:
        ConfigError: the tokenizer is of a kind that is not known.
        CheckpointError: its metadata are damaged, or the cache cannot be written.
    """
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    files = tokenizer_files(file)
    content = b"".join(b"%s %d\n%s" % (name.encode(), len(c), c) for name, c in sorted(files.items()))
    folder = cache_dir / "tokenizers" / hashlib.sha256(content).hexdigest()[:32]
    try:
        for name, content in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != content:
                write_atomic(path, content)
    except OSError as e:
        raise CheckpointError(
            f"the tokenizer of {file.path} cannot be kept in {folder}: {e.strerror}. Make room, or set "
            "PIPPIN_CACHE_DIR to a directory that can be written."
        ) from None
    return folder


def tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """The content of the tokenizer's files by name; raises as `write_tokenizer` does."""
    tokens, types = _vocabulary(file)
    ids = {name: _id(file, theirs, len(tokens)) for name, theirs in _SPECIAL.items()}
    config: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    config |= {
        f"add_{name}_token": file.flag(f"tokenizer.ggml.add_{name}_token", False) for name in ("bos", "eos")
    }
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.text("tokenizer.chat_template")
    ends = {i for name in _TURN_ENDS if (i := _id(file, name, len(tokens))) is not None}
    model = file.text("tokenizer.ggml.model")
    if model == "gpt2":
        files = {"tokenizer.json": _json(_byte_level(file, tokens, types))}
    elif model == "llama":
        files = {"tokenizer.model": _sentencepiece(file, tokens, types, ids)}
    else:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.model is {model[:80]!r}, which is not supported: it must be 'gpt2' "
            "(byte-level BPE) or 'llama' (SentencePiece). Choose another model."
        )
    # Goes with the tokenizer, as in folders of Hugging Face: how long texts may be.
    longest = file.integer(f"{file.text('general.architecture', '')}.context_length", 0)
    if longest > 0:
        files["config.json"] = _json({"max_position_embeddings": longest})
    return files | {
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json({"eos_token_id": sorted(ends)}),
    }


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types."""
    tokens = file.texts("tokenizer.ggml.tokens")
    types = file.numbers("tokenizer.ggml.token_type")
    kinds = [NORMAL] * len(tokens) if types is None else [int(t) for t in types]
    problem = (
        "there are no tokens"
        if not tokens
        else f"{len(kinds)} types are given for {len(tokens)} tokens"
        if len(kinds) != len(tokens)
        else f"a token is of type {min(set(kinds) - set(_TYPES))}"
        if set(kinds) - set(_TYPES)
        else "two tokens are the same"
        if len(set(tokens)) != len(tokens)
        else None
    )
    if problem:
        raise _damaged(file, problem)
    return tokens, kinds


def _id(file: GGUFFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    if not 0 <= (value := file.integer(key)) < count:
        raise _damaged(file, f"{key} is {value}, and there are {count} tokens")
    return value


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """A tokenizer.json, as the model's own was."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in file.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise _damaged(file, f"{' '.join(merge)[:80]!r} merges no two tokens into a third")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": kind != USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "post_processor": None,
        "decoder": _byte_level_step(split=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # a byte that no token has is left out: no text may become a special token
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": takes_whole_words(file.text("tokenizer.ggml.pre", "")),
            "vocab": vocabulary,
            "merges": merges,
        },
    } | _before_merging(file)


def ways_to_split() -> dict[str, dict[str, Any]]:
    """How text is normalised and split before BPE, by the name of the way: two entries of a tokenizer.json.

    Source: the tokenizer.json of GPT-2, SmolLM2, Llama 3 and Qwen2.
    """
    names: dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]] = {
        "gpt-2": (None, [_byte_level_step(split=True)]),
        "smollm": (None, [{"type": "Digits", "individual_digits": True}, _byte_level_step(split=True)]),
        "llama-bpe": (None, [_split(_LLAMA3_WORDS % "{1,3}"), _byte_level_step(split=False)]),
        "qwen2": ({"type": "NFC"}, [_split(_LLAMA3_WORDS % ""), _byte_level_step(split=False)]),
    }
    return {
        name: {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        for name, (normalizer, steps) in names.items()
    }


def takes_whole_words(way: str) -> bool:
    """Whether words that are tokens are taken as they are, before any merging."""
    return way == "llama-bpe"


def _before_merging(file: GGUFFile) -> dict[str, Any]:
    names = ways_to_split()
    name = file.text("tokenizer.ggml.pre", "none")
    if name not in names:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.pre is {name[:80]!r}, a way to split text that is not known: "
            f"{', '.join(names)} are. Take the model as a Hugging Face folder, whose tokenizer.json says how."
        )
    return names[name]


def _byte_level_step(*, split: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split}


def _split(words: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int], ids: dict[str, int | None]) -> bytes:
    """A tokenizer.model, as the model's own was: BPE by scores, without a normaliser."""
    from sentencepiece import sentencepiece_model_pb2 as sp

    scores = file.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise _damaged(
            file, "a SentencePiece model has one finite score for each token, in tokenizer.ggml.scores"
        )
    model: Any = sp.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=float(score), type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), BYTE in types
    for name, i in ids.items():
        if i is not None:
            setattr(trainer, f"{name}_id", i)
            setattr(trainer, f"{name}_piece", tokens[i])
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    return model.SerializeToString(deterministic=True)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=0, separators=(",", ":")).encode()


def _damaged(file: GGUFFile, problem: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: its tokenizer is damaged: {problem}. Get the file again.")
