import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.errors import DataError
from pippin.core.tokenizer import (
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_digest,
)

_TEXT = "def main():\n    return 12345  # the tail\n" * 40

# Whatever tokenizers are known to stumble over, beside any other character.
_TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8")),
        st.sampled_from(
            list(" \t\n\r\x00\u2581\ufeff\u200d7") + ["    ", "\r\n", "👩\u200d👧", "e\u0301", "<s>", "main"]
        ),
    )
).map("".join)


def _sentencepiece(add_dummy_prefix: bool = False, **ids: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_TEXT]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,  # pyright: ignore[reportArgumentType]
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "tokenizer.model").write_bytes(_sentencepiece(pad_id=0, eos_id=1, unk_id=2, bos_id=3))
    return directory


@pytest.fixture(scope="module")
def json_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("json")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=["model", "json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(f"{request.param}_directory"))


def test_every_text_comes_back(model_directory: Path, json_directory: Path) -> None:
    opened = [load_tokenizer(model_directory), load_tokenizer(json_directory)]

    @given(_TEXTS)
    @settings(max_examples=300, deadline=None)
    def check(text: str) -> None:
        for tokenizer in opened:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.vocab_size for i in ids)

    check()


def test_special_tokens_are_never_read_from_text(tokenizer: Tokenizer) -> None:
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("<s>a</s>"))


def test_special_tokens_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("main"), tokenizer.eos_id]) == "main"
    assert tokenizer.decode([]) == ""


def test_ids_of_no_token_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("main"), 1 << 20, -1]) == "main"


def test_the_bytes_of_tokens_make_up_the_text(model_directory: Path, json_directory: Path) -> None:
    opened = [load_tokenizer(model_directory), load_tokenizer(json_directory)]

    @given(_TEXTS)
    @settings(max_examples=200, deadline=None)
    def check(text: str) -> None:
        for tokenizer in opened:
            assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()

    check()


def test_special_tokens_and_no_tokens_have_no_bytes(tokenizer: Tokenizer) -> None:
    assert {tokenizer.bos_id, tokenizer.eos_id} <= tokenizer.special_ids
    assert tokenizer.special_ids == set(tokenizer.special_tokens.values())
    for i in (*tokenizer.special_ids, -1, tokenizer.vocab_size, 1 << 20):
        assert tokenizer.token_bytes(i) == b""


def test_bytes_start_with_the_space_that_a_model_puts_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece(add_dummy_prefix=True))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("main é")
    assert b"".join(map(tokenizer.token_bytes, ids)) == " main é".encode()
    assert tokenizer.decode(ids) == "main é"


def test_ends_of_turns_come_from_all_files_and_names(json_directory: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(json_directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    end = tokenizer.token_to_id("<|im_end|>")
    assert load_tokenizer(tmp_path).eos_ids == {1, end}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7, 100000]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    assert load_tokenizer(tmp_path).eos_ids == {1, 7, 8, end}


def test_what_a_text_begins_with_is_told_by_the_files(
    json_directory: Path, model_directory: Path, tmp_path: Path
) -> None:
    assert load_tokenizer(model_directory).start_ids == (3,)
    assert load_tokenizer(json_directory).start_ids == ()
    tokenizer = tokenizers.Tokenizer.from_file(str(json_directory / "tokenizer.json"))
    start, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).start_ids == (start,)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": false}')
    assert load_tokenizer(tmp_path).start_ids == ()


def test_special_ids_come_from_the_model(model_directory: Path) -> None:
    tokenizer = load_tokenizer(model_directory)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 3)


def test_special_ids_come_from_the_names_of_tokens(json_directory: Path) -> None:
    tokenizer = load_tokenizer(json_directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)  # padded with the end


def test_special_ids_come_from_the_model_config_where_nothing_names_them(
    json_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((json_directory / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).bos_id is None
    assert load_tokenizer(tmp_path).pad_id == 0
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 7]}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_a_model_that_puts_a_space_first_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece(add_dummy_prefix=True))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_a_copy_is_the_same_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for name in ("model_directory", "json_directory"):
        source = request.getfixturevalue(name)
        copy_tokenizer(source, tmp_path / name)
        assert tokenizer_digest(tmp_path / name) == tokenizer_digest(source)
        assert load_tokenizer(tmp_path / name).encode(_TEXT) == load_tokenizer(source).encode(_TEXT)
    assert tokenizer_digest(tmp_path / "model_directory") != tokenizer_digest(tmp_path / "json_directory")


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="'\\\\ud800' at character 1, a lone surrogate"):
        tokenizer.encode("a\ud800")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(DataError, match="expected tokenizer.model or tokenizer.json, found vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x00\xff\xfe"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.model is no SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_damaged_json_is_refused(tmp_path: Path, json_directory: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer.json is no tokenizers file"):
        load_tokenizer(tmp_path)
    copy_tokenizer(json_directory, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="tokenizer_config.json holds a JSON list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(DataError, match="eos_token '<|end|>', which is no token"):
        load_tokenizer(tmp_path)
