"""Tokenizers: text to token ids and back, opened from the files that lie in a directory.

`load_tokenizer` opens a SentencePiece model (`tokenizer.model`) or a Hugging
Face `tokenizers` file (`tokenizer.json`); the libraries are imported when one
is opened.
"""

from __future__ import annotations

import abc
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pippin.core.errors import DataError
from pippin.core.token_bytes import SPACE_MARK, bytes_of_token

if TYPE_CHECKING:
    import tokenizers

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
# All that `load_tokenizer` and `load_chat_template` read.
_FILES = (
    _JSON,
    _MODEL,
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)

# Special tokens that end a turn by their name, whatever a model's files say.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")


class Tokenizer(abc.ABC):
    """Text to token ids and back; the ids of its special tokens.

    Special tokens are never read from text: text that spells one is encoded
    letter by letter, and `decode` leaves special tokens out.
    `pippin.core.chat_template` puts them where a template has them.
    """

    vocab_size: int  # ids are below it
    bos_id: int | None
    eos_id: int | None
    pad_id: int  # an id that may fill a row; the loss never counts it
    eos_ids: frozenset[int]  # all that end a text or a turn, `eos_id` among them
    start_ids: tuple[int, ...]  # what a model expects before each text
    special_tokens: Mapping[str, int]  # as they are spelt -> id

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text."""
        return frozenset(self.special_tokens.values())

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            DataError: the text holds a lone surrogate, which no encoding of Unicode can hold.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids.

        Ids that are no token's are left out: a model's vocabulary may be larger than its tokenizer's.
        """

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8 and maybe a part of a character; nothing if it is special or no token.

        The bytes of a text's ids make up what `decode` says of them. Only, where a tokenizer puts a space before
        each text, they start with that space, and `decode` takes it away again.

        Raises:
            DataError: the tokens of this kind of tokenizer are no bytes.
        """


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Lossless, `decode(encode(text)) == text`, where the model has byte fallback,
    the identity normaliser, and neither adds nor removes spaces.

    Source: Kudo and Richardson 2018, arXiv:1808.06226.
    """

    def __init__(self, model: bytes, eos_ids: Iterable[int] = ()):
        """Takes the model, and ids that end a turn beside its own."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.pad_id = _pad_id(_id_or_none(self._processor.pad_id()), self.eos_id)
        control = [i for i in range(self.vocab_size) if self._processor.is_control(i)]
        self.special_tokens = {self._processor.id_to_piece(i): i for i in control}
        self.eos_ids = _turn_ends(self, eos_ids)
        # As in training here: a model without a token for the start of a text reads on behind the end of another.
        self.start_ids = tuple(i for i in (self.bos_id, self.eos_id) if i is not None)[:1]
        # In a text the mark of spaces would come back as a space, so it is spelt in bytes, which
        # needs byte fallback, and that no space is put before the rest.
        lossless = proto.trainer_spec.byte_fallback and not proto.normalizer_spec.add_dummy_prefix
        self._mark_ids = (
            [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
            if lossless
            else []
        )

    def encode(self, text: str) -> list[int]:
        _require_unicode(text)
        if not self._mark_ids or SPACE_MARK not in text:
            return self._processor.encode(text)
        first, *rest = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._mark_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size or self._processor.is_control(token_id):
            return b""
        if self._processor.is_unknown(token_id):
            return self._processor.decode([token_id]).encode()  # the mark that the model has for it
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face `tokenizers`, as lossless as its normaliser and its alphabet.

    Tokens that were added after training and are not special, such as `<think>` of some models, are read from text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special_ids: dict[str, int | None],
        eos_ids: Iterable[int] = (),
    ):
        """Takes the library's tokenizer, the ids by "bos", "eos" and "pad", and more that end a turn."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id, self.eos_id = special_ids["bos"], special_ids["eos"]
        self.pad_id = _pad_id(special_ids["pad"], self.eos_id)
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.eos_ids = _turn_ends(self, eos_ids)
        self.start_ids = _before(tokenizer)
        self._special_ids = self.special_ids
        self._bytes_of = bytes_of_token(tokenizer.decoder)

    def encode(self, text: str) -> list[int]:
        _require_unicode(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True
        )

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None or token_id in self._special_ids else self._bytes_of(token)


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer whose files lie in a directory.

    `tokenizer.json` is taken before `tokenizer.model`, since it alone holds
    tokens that were added after training. Its special tokens are those of
    `tokenizer_config.json`, or else the ids of `config.json`.

    Raises:
        DataError: there is no tokenizer, or its file is damaged.
    """
    directory = Path(directory)
    if (directory / _JSON).is_file():
        return _load_json(directory)
    if (directory / _MODEL).is_file():
        return _load_sentencepiece(directory)
    found = (
        ", ".join(sorted(p.name for p in directory.iterdir())[:10])
        if directory.is_dir()
        else "no such directory"
    )
    raise DataError(
        f"{directory} holds no tokenizer: expected {_MODEL} or {_JSON}, found {found or 'nothing'}. "
        "Give the directory that holds one of these files."
    )


def tokenizer_files(directory: Path | str) -> list[Path]:
    """The files of a directory that `load_tokenizer` reads."""
    return [Path(directory) / name for name in _FILES if (Path(directory) / name).is_file()]


def copy_tokenizer(source: Path | str, target: Path | str) -> None:
    """Copies a tokenizer's files into a directory, which is made."""
    load_tokenizer(source)
    Path(target).mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files(source):
        shutil.copyfile(file, Path(target) / file.name)


def tokenizer_digest(directory: Path | str) -> str:
    """The SHA-256 of a tokenizer's files, names included, in hex: equal for equal tokenizers."""
    digest = hashlib.sha256()
    for file in tokenizer_files(directory):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _load_sentencepiece(directory: Path) -> Tokenizer:
    from google.protobuf.message import DecodeError

    path, eos_ids = directory / _MODEL, _listed_eos_ids(directory)
    try:
        return SentencePieceTokenizer(path.read_bytes(), eos_ids)
    except (RuntimeError, DecodeError) as e:
        raise DataError(
            f"{path} is no SentencePiece model: {e}. Copy it again; a tokenizer.model of Llama 3's own format is "
            f"not one, so give the {_JSON} of the same model instead."
        ) from e


def _load_json(directory: Path) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / _JSON))
    except Exception as e:  # the library raises Exception itself
        raise DataError(f"{directory / _JSON} is no tokenizers file: {e}. Copy it again.") from e
    tokens, ids = (
        read_tokenizer_object(directory / name) for name in ("tokenizer_config.json", "config.json")
    )
    special_ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        token, number = tokens.get(f"{name}_token"), ids.get(f"{name}_token_id")
        text = token_text(token)
        first = number[0] if isinstance(number, list) and number else number  # some models have several
        special_ids[name] = tokenizer.token_to_id(text) if text else first if isinstance(first, int) else None
        if text and special_ids[name] is None:
            raise DataError(
                f"{directory / 'tokenizer_config.json'} names {name}_token {text!r}, which is no token of {_JSON}. "
                "The two files belong to different tokenizers: copy both from one model."
            )
    made = JsonTokenizer(tokenizer, special_ids, _listed_eos_ids(directory))
    if isinstance(adds := tokens.get("add_bos_token"), bool):
        made.start_ids = (made.bos_id,) if adds and made.bos_id is not None else ()
    return made


def read_tokenizer_object(path: Path) -> dict[str, Any]:
    """The object in one of a tokenizer's JSON files; an empty one where there is no such file.

    Raises:
        DataError: the file holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is no JSON: {e}. Copy it again.") from e
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}; an object is expected. Copy it again.")
    return value


def token_text(token: Any) -> str | None:
    """What a token of tokenizer_config.json is spelt like: it is a string there, or an object, or null."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _listed_eos_ids(directory: Path) -> list[int]:
    """The ids that end a turn, as generation_config.json and config.json list them."""
    listed: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_tokenizer_object(directory / name).get("eos_token_id")
        listed += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return listed


def _before(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the library puts before a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def _turn_ends(tokenizer: Tokenizer, listed: Iterable[int]) -> frozenset[int]:
    named = [i for token, i in tokenizer.special_tokens.items() if token in _TURN_ENDS]
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return frozenset([*own, *named, *(i for i in listed if 0 <= i < tokenizer.vocab_size)])


def _id_or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _pad_id(pad: int | None, eos: int | None) -> int:
    return pad if pad is not None else eos if eos is not None else 0


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"the text holds {text[e.start]!r} at character {e.start}, a lone surrogate, which is no Unicode text. "
            "Remove it, for example with text.encode(errors='ignore').decode()."
        ) from None
