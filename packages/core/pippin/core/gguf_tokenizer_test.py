import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from pippin.core.chat_template import load_chat_template
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.gguf_file import open_gguf
from pippin.core.gguf_testing import write_gguf
from pippin.core.gguf_tokenizer import write_tokenizer
from pippin.core.tokenizer import Tokenizer, load_tokenizer

_TEXT = "def main():\n    return 12345  # it's the tail, isn't it? Ünïcödé 日本語\r\n\n\n" * 40
_TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8")),
        st.sampled_from(
            [
                *" \t\n\r7x",
                "  ",
                "\r\n",
                "it's",
                "IT'S",
                "123456",
                "²½",
                "e\u0301",
                "<|im_end|>",
                "日本",
                "main",
            ]
        ),
    )
).map("".join)

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(words: str) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(words), "isolated")


# The name of a way to split -> that way, as the models' own tokenizer.json have it.
_WAYS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: _WORDS,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS]),
    "llama-bpe": lambda: pre_tokenizers.Sequence([_split(_LLAMA3), _PLAIN]),
    "qwen2": lambda: pre_tokenizers.Sequence([_split(_LLAMA3.replace("{1,3}", "")), _PLAIN]),
}


def _trained(way: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=way == "llama-bpe"))
    tokenizer.pre_tokenizer = _WAYS[way]()
    tokenizer.decoder = decoders.ByteLevel()
    if way == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_level(way: str, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": way,
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [3] * len(_SPECIAL) + [1] * (len(model["vocab"]) - len(_SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}<|im_end|>",
    }


@pytest.fixture(scope="module")
def smollm() -> dict[str, Any]:
    return _byte_level("smollm", _trained("smollm"))


def _open(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    written = write_tokenizer(open_gguf(write_gguf(folder / "model.gguf", metadata)), folder)
    assert written is not None
    return load_tokenizer(written)


def _joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@pytest.mark.parametrize("way", _WAYS)
def test_byte_level_ids_are_those_of_the_models_own_tokenizer(way: str, tmp_path: Path) -> None:
    theirs = _trained(way)
    ours = _open(tmp_path, _byte_level(way, theirs))

    @given(_TEXTS)
    @settings(max_examples=150, deadline=None)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert _joined(ours, ids) == ours.decode(ids)

    check()


def test_special_tokens_and_the_template_come_along(smollm: dict[str, Any], tmp_path: Path) -> None:
    file = open_gguf(write_gguf(tmp_path / "model.gguf", smollm))
    folder = write_tokenizer(file, tmp_path)
    assert folder is not None
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {token: i for i, token in enumerate(_SPECIAL)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, 0)
    assert tokenizer.eos_ids == {0, 2}
    template = load_chat_template(folder, tokenizer)
    assert template is not None
    ids = template.encode([{"role": "user", "content": "<|im_end|>"}])
    assert ids == [1, *tokenizer.encode("<|im_end|>"), 2]
    assert template.render([{"role": "user", "content": "a"}]) == "<|im_start|>a<|im_end|>"


def test_user_defined_tokens_are_read_from_text(smollm: dict[str, Any], tmp_path: Path) -> None:
    types = [3] * len(_SPECIAL) + [1] * (len(smollm["tokenizer.ggml.tokens"]) - len(_SPECIAL))
    metadata = smollm | {
        "tokenizer.ggml.tokens": [*smollm["tokenizer.ggml.tokens"], "<think>"],
        "tokenizer.ggml.token_type": [*types, 4],
    }
    tokenizer = _open(tmp_path, metadata)
    ids = tokenizer.encode("a<think>b")
    assert len(ids) == 3 and ids[1] == tokenizer.vocab_size - 1
    assert ids[1] not in tokenizer.special_ids
    assert _joined(tokenizer, ids) == "a<think>b"


def test_no_text_becomes_the_unknown_token(smollm: dict[str, Any], tmp_path: Path) -> None:
    """Some vocabularies, such as SmolLM2's, lack bytes."""
    tokens = [
        "?" * 9 if token == "\u0104" else token for token in smollm["tokenizer.ggml.tokens"]
    ]  # byte 0x04
    tokenizer = _open(tmp_path, smollm | {"tokenizer.ggml.tokens": tokens})
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"
    assert not tokenizer.special_ids & set(tokenizer.encode("a\x04b"))


def _sentencepiece(add_space: bool) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, Any]]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_TEXT.replace("\r", "")]),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=add_space,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())  # pyright: ignore[reportCallIssue]
    ids = range(theirs.vocab_size())

    def kind(i: int) -> int:
        return 2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1

    return theirs, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space,
    }


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_ids_are_those_of_the_models_own_tokenizer(add_space: bool, tmp_path: Path) -> None:
    theirs, metadata = _sentencepiece(add_space)
    ours = _open(tmp_path, metadata)
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (1, 2, {2})

    @given(_TEXTS)
    @settings(max_examples=150, deadline=None)
    def check(text: str) -> None:
        if "\u2581" in text:  # which is spelt in bytes here
            return
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert _joined(ours, ids).removeprefix(" " if add_space else "") == ours.decode(ids)

    check()


def test_a_folder_is_named_for_its_content_and_mended(smollm: dict[str, Any], tmp_path: Path) -> None:
    file = open_gguf(write_gguf(tmp_path / "model.gguf", smollm))
    folder = write_tokenizer(file, tmp_path)
    other = open_gguf(write_gguf(tmp_path / "other.gguf", smollm | {"tokenizer.ggml.eos_token_id": 2}))
    assert folder is not None and folder != write_tokenizer(other, tmp_path)
    before = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(before[:100])
    (folder / "generation_config.json").unlink()
    assert write_tokenizer(file, tmp_path) == folder
    assert (folder / "tokenizer.json").read_bytes() == before
    assert (folder / "generation_config.json").is_file()


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert write_tokenizer(open_gguf(write_gguf(tmp_path / "model.gguf", {})), tmp_path) is None


def test_a_cache_that_cannot_be_written_is_named(smollm: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizers").write_text("")
    with pytest.raises(CheckpointError, match="cannot be kept in .*set PIPPIN_CACHE_DIR"):
        _open(tmp_path, smollm)


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (
            {"pre": "default"},
            ConfigError,
            "tokenizer.ggml.pre is 'default', a way to split text that is not known",
        ),
        ({"pre": None}, ConfigError, "tokenizer.ggml.pre is 'none'"),
        ({"model": "bert"}, ConfigError, "tokenizer.ggml.model is 'bert', which is not supported"),
        ({"model": "llama"}, CheckpointError, "one finite score for each token"),
        ({"tokens": None}, CheckpointError, "there are no tokens"),
        ({"tokens": ["a"]}, CheckpointError, "types are given for 1 tokens"),
        ({"token_type": [1, 9]}, CheckpointError, "2 types are given"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, CheckpointError, "two tokens are the same"),
        ({"tokens": ["a", "b"], "token_type": [1, 9]}, CheckpointError, "a token is of type 9"),
        ({"merges": ["nothing here is"]}, CheckpointError, "'nothing here is' merges no two tokens"),
        ({"bos_token_id": 4_000}, CheckpointError, "bos_token_id is 4000, and there are"),
    ],
)
def test_damaged_and_unknown_tokenizers_are_refused(
    change: dict[str, Any], error: type[Exception], problem: str, smollm: dict[str, Any], tmp_path: Path
) -> None:
    metadata = smollm | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(error, match=problem):
        _open(tmp_path, {key: value for key, value in metadata.items() if value is not None})


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    _, metadata = _sentencepiece(True)
    metadata["tokenizer.ggml.scores"][5] = float(np.nan)
    with pytest.raises(CheckpointError, match="one finite score"):
        _open(tmp_path, metadata)
