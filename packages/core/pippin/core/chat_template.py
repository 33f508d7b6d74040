"""Chat templates: a conversation as the text, or the ids, that a model was trained on.

A template is a Jinja program that comes with a model. It runs in a sandbox,
with bounds on its time and memory (`pippin.core.chat_sandbox`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from pippin.core.chat_sandbox import MAX_CHARS, ChatEnvironment, metered
from pippin.core.errors import DataError
from pippin.core.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_object, token_text

_FILE = "chat_template.jinja"
_MAX_SOURCE_CHARS = 256 << 10

Message = Mapping[str, Any]  # "role", "content", and whatever else the template reads


class ChatTemplate:
    """A model's template and tokenizer.

    A special token is made by the template's own words alone. Where the template's
    source spells one, `encode` gives its id; the same letters inside a message, a
    role, a tool or a variable are text and are encoded letter by letter, wherever
    the template puts them. Without such letters, the ids are those of the whole
    rendered text, since text is only cut where a special token stands.

    Inside the template, spelt special tokens are marks that no message can hold, so
    a template that looks for one in a message does not find it.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str] | None = None):
        """Compiles a template.

        Args:
            source: in Jinja.
            tokenizer: of the same model.
            names: variables that stand for special tokens, such as "bos_token" -> "<s>".

        Raises:
            DataError: the source is no template.
        """
        if len(source) > _MAX_SOURCE_CHARS:
            raise DataError(
                f"the chat template has {len(source)} characters; at most {_MAX_SOURCE_CHARS} are read. It is none."
            )
        self._tokenizer = tokenizer
        # A mark is a special token's id between two characters that Unicode keeps out of texts, with a
        # number that nobody can guess: a message cannot spell one.
        secret = f"{secrets.randbelow(10**18):018}"
        self._mark = f"\ufdd0{secret}:{{}}\ufdd1".format
        self._marks = re.compile(f"\ufdd0{secret}:([0-9]+)\ufdd1")
        self._spelling = {i: token for token, i in tokenizer.special_tokens.items()}
        # A name such as `user` would be found in the program, and not only in what it writes.
        spelt = [re.escape(t) for t in self._spelling.values() if t and not t.isidentifier()]
        spelt.sort(key=len, reverse=True)
        self._special = re.compile("|".join(spelt)) if spelt else None
        self._names = {name: self._marked(text) for name, text in (names or {}).items()}
        try:
            self._template = ChatEnvironment().from_string(self._marked(source))
        except (jinja2.TemplateError, RecursionError) as e:
            raise DataError(
                f"the chat template is no Jinja: {self._unmarked(str(e))}. Copy the model's files again."
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, with special tokens spelt.

        Args:
            messages: the conversation.
            add_generation_prompt: ends with what the assistant's next message starts with.
            tools: functions that the model may call, as JSON schemas.
            variables: more that the template reads.

        Raises:
            DataError: the template refuses the conversation, fails, or does too much.
        """
        return self._unmarked(self._render(messages, add_generation_prompt, tools, variables))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of the conversation; see the class for which of them are special.

        Args:
            messages: as for `render`.
            add_generation_prompt: as for `render`.
            tools: as for `render`.
            variables: as for `render`.

        Raises:
            DataError: as for `render`; or the template makes a special token out of parts, which would be text here.
        """
        given = json.dumps([messages, tools, variables], ensure_ascii=False, default=str)
        ids: list[int] = []
        for part in self._parts(self._render(messages, add_generation_prompt, tools, variables)):
            if isinstance(part, int):
                ids.append(part)
            else:
                self._require_given(part, given)
                ids += self._tokenizer.encode(part)
        return ids

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        parts, size = [], 0
        try:
            with metered():
                for part in self._template.generate(
                    **self._names,
                    **(variables or {}),
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                ):
                    size += len(part)
                    if size > MAX_CHARS:
                        raise DataError(
                            f"the chat template writes more than {MAX_CHARS} characters. Give a shorter conversation."
                        )
                    parts.append(part)
        except DataError:
            raise
        except Exception as e:  # whatever expressions of the template raise
            reason = self._unmarked(str(e))[:500].rstrip(".") or type(e).__name__
            raise DataError(
                f"the chat template does not take this conversation: {reason}. Change the messages, or the template."
            ) from e
        return "".join(parts)

    def _marked(self, text: str) -> str:
        tokens = self._tokenizer.special_tokens
        return self._special.sub(lambda m: self._mark(tokens[m[0]]), text) if self._special else text

    def _unmarked(self, text: str) -> str:
        return self._marks.sub(lambda m: self._spelling[int(m[1])], text)

    def _parts(self, text: str) -> Iterator[str | int]:
        """Texts, and the ids of the marks between them."""
        for i, part in enumerate(self._marks.split(text)):
            if i % 2:
                yield int(part)
            elif part:
                yield part

    def _require_given(self, text: str, given: str) -> None:
        # Each token once: a message may spell one a hundred thousand times.
        for token in {match[0] for match in self._special.finditer(text)} if self._special else ():
            if token not in given:
                raise DataError(
                    f"the chat template makes {token!r} out of parts; a special token is only read where the "
                    "template spells it whole. Write it out in the template."
                )


def load_chat_template(directory: Path | str, tokenizer: Tokenizer | None = None) -> ChatTemplate | None:
    """The chat template among a tokenizer's files, or None: in chat_template.jinja, or in tokenizer_config.json.

    Args:
        directory: as for `load_tokenizer`.
        tokenizer: the one in the directory, where it was loaded already.

    Raises:
        DataError: the template or its file is damaged, or there is no tokenizer.
    """
    directory = Path(directory)
    source = chat_template_source(directory)
    config = read_tokenizer_object(directory / "tokenizer_config.json")
    if source is None:
        return None
    names = {
        name: text
        for name, value in config.items()
        if name.endswith("_token") and (text := token_text(value))
    }
    return ChatTemplate(source, tokenizer or load_tokenizer(directory), names)


def chat_template_source(directory: Path) -> str | None:
    """The chat template among a tokenizer's files as it is written there, or None; raises as `load_chat_template` does."""
    config = read_tokenizer_object(directory / "tokenizer_config.json")
    return _read_source(directory / _FILE) or _named_default(config.get("chat_template"))


def _read_source(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        content = file.read(4 * _MAX_SOURCE_CHARS + 1)  # one byte more than what is refused anyway
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text. Copy it again.") from None


def _named_default(value: Any) -> str | None:
    """The template in tokenizer_config.json: a string, or the one named "default" of several."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
